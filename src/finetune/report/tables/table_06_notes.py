"""The notes under Table 6: how numbers are computed, who judged, which methods are apart, which share is printed."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.mt_bench.comparison import (
    PUBLISHED_NOISE,
    comparison_verdict,
    paired_bootstrap,
    repeat_noise,
)
from finetune.mt_bench.judged import Judged
from finetune.mt_bench.scores import summarize
from finetune.report.evidence.llama_evidence import PAPER_MODEL, LlamaEvidence
from finetune.report.paper.layouts import METHODS, PAPER_MODELS
from finetune.report.paper.shares import Shares
from finetune.report.tables.comparability import PAPER_PROTOCOLS
from finetune.stats import verdicts

LABELS = {method: label for label, method in METHODS.items()}
"""Method -> row label."""


def rules(loss_margin: float, paper_runs: int, stratified: bool) -> list[str]:
    """State how the columns are computed and compared."""
    return [
        "#Train params is trainable / total parameters of the model that ran, in percent. It agrees if, rounded to the "
        "printed digits, it is as printed.",
        "Valid Loss is the best loss on the validation split, in nats a token, mean over seeds with a t interval; "
        "lower is better. It differs if the 95 % Welch interval of (ours - paper) excludes 0 and |ours - paper| "
        f"exceeds the print's rounding; else it agrees if the interval lies within ±{loss_margin:g}, and is "
        f"inconclusive if not. The paper states no number of runs for this table; {paper_runs} are assumed, as it says "
        "for GLUE.",
        "I-Bench Score is FastChat's: the mean over both turns of all questions, an item judged several times with its "
        "median; mean over seeds, 95 % bootstrap interval over questions with the seeds averaged first"
        f"{', drawn within their categories' if stratified else ''}. The paper prints no deviation for it: at best the "
        "comparison is inconclusive.",
        f"Protocols that may be compared with the print: {', '.join(PAPER_PROTOCOLS)}.",
    ]


def judging(evidence: LlamaEvidence, categories: Mapping[int, str] | None) -> list[str]:
    """Name the judge, the repeats, what failed, which prompts were cut, and the scores by turn and category."""
    everything = [one for found in evidence.judged.values() for one in found]
    if not everything:
        return ["Nothing was judged."]
    record = everything[0].record
    judge = record["judge"]
    quality = "" if judge["measures_quality"] else " Its scores are no measure of quality."
    notes = [
        f"Judge: {judge['model']}, temperature {judge['temperature']}, {_times(judge['repeats'])}; "
        f"{record['questions']['count']} questions of {record['questions']['file']} "
        f"(sha256 {record['questions']['sha256'][:12]}).{quality}"
    ]
    lost = [f"{one.path}: {one.shortfall()}" for one in everything if one.shortfall()]
    ratings, expected = sum(len(one.lines) for one in everything), sum(one.expected for one in everything)
    notes.append(
        f"Judgments without a rating: {expected - ratings} of {expected}."
        if ratings < expected
        else f"Judgments: all {expected} have a rating."
    )
    notes += [f"{text}." for text in lost]
    cut, refused = (sum(one.record["answers"][name] for one in everything) for name in ("cut", "refused"))
    notes.append(f"Prompts longer than the model's window: {cut} cut, {refused} refused.")
    for method in _judged_methods(evidence):
        scores = [summarize(one.items(), categories) for one in _with_lines(evidence, method)]
        turns = ", ".join(f"turn {turn} {_mean([s.turns.get(turn) for s in scores])}" for turn in (1, 2))
        names = dict.fromkeys(name for score in scores for name in score.categories)
        by_category = [f"{name} {_mean([s.categories.get(name) for s in scores])}" for name in names]
        noise = _noise(_with_lines(evidence, method))
        spread = [f"spread of a mean over repeats {noise:.3f}"] if noise is not None else []
        notes.append(f"{LABELS[method]}: {', '.join([turns, *by_category, *spread])}.")
    return notes


def _times(repeats: int) -> str:
    return "each item judged once" if repeats == 1 else f"{repeats} repeats of each item"


def pairs(evidence: LlamaEvidence, categories: Mapping[int, str] | None, seed: int) -> list[str]:
    """Compare each two methods' scores."""
    methods = _judged_methods(evidence)
    if len(methods) < 2:
        return []
    items = {method: [one.items() for one in _with_lines(evidence, method)] for method in methods}
    noise = {method: _noise(_with_lines(evidence, method)) for method in methods}
    quality = all(one.record["judge"]["measures_quality"] for method in methods for one in evidence.judged[method])
    notes = [
        "Two methods are separated if the 95 % interval of their paired difference (bootstrap over questions, seeds "
        "averaged first) excludes 0 and |difference| is at least the judge's noise: the largest spread (largest minus "
        "smallest) of one answer file's mean over the repeats of its judgments"
        + (
            f", and {PUBLISHED_NOISE} points, known of GPT-4 on fixed answers (FastChat issues 3018 and 2969), where "
            "nothing was judged twice."
            if None in noise.values()
            else "."
        )
        + ("" if quality else " The judge's scores are no measure of quality, so no pair says which method is better.")
    ]
    for first, second in itertools.combinations(methods, 2):
        label = f"{LABELS[first]} - {LABELS[second]}"
        if not set.intersection(*(set(found) for found in (*items[first], *items[second]))):
            notes.append(f"{label}: {verdicts.INCONCLUSIVE}, no item was judged for every seed of both.")
            continue
        found = paired_bootstrap(items[first], items[second], seed=seed, categories=categories)
        threshold = max(PUBLISHED_NOISE if noise[name] is None else noise[name] for name in (first, second))
        verdict = comparison_verdict(found, threshold)
        interval = f" [{found.low:+.3f}, {found.high:+.3f}]" if found.low is not None else ", no interval"
        unpaired = f", {found.unpaired} items not paired" if found.unpaired else ""
        notes.append(
            f"{label}: {found.difference:+.3f}{interval}, noise {threshold:.3f}: "
            f"{verdict if quality else f'{verdicts.NOT_COMPARABLE} in quality (by the rule: {verdict})'} "
            f"({found.items} items of {found.questions} questions{unpaired})."
        )
    return notes


def readings(shares: Shares, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say from which reading each printed share follows (D17 to D19)."""
    text, gated, every = shares.variants
    prefix, suffix = f"{PAPER_MODELS[PAPER_MODEL]} ", " share"
    agreeing: dict[str, list[str]] = {}
    printed: dict[str, str] = {}
    for row in rows:
        if row["column"].endswith(suffix):
            printed[row["row"]] = row["paper"]
            found = agreeing.setdefault(row["row"], [])
            found += [row["column"].removeprefix(prefix).removesuffix(suffix)] * (row["verdict"] == verdicts.AGREES)

    def follows(method: str) -> str:
        label = LABELS[method]
        found = " or ".join(agreeing[label])
        return f"the {printed[label]} of {label} follows from {found or 'none of the readings counted here'}"

    def values(method: str) -> str:
        return ", ".join(f"{variant.shares[method]:.3g} % {variant.name}" for variant in shares.variants)

    k = shares.k
    return [
        f"Columns ending in share are exact counts of {PAPER_MODELS[PAPER_MODEL]}-7B ({shares.total:,} parameters), "
        "whichever model ran.",
        f"D17: {follows('full')}; the text names {text.name} ({text.shares['full']:.2f} %), the released code trains "
        f"gate_proj too ({gated.shares['full']:.2f} %).",
        f"D18: {follows('lora')} at rank {shares.rank} ({every.shares['lora']:.3f} %); the text names the selected "
        f"blocks ({text.shares['lora']:.3f} %).",
        f"D19: {follows('sparsegrad')}, and {follows('meprop')}: k = {k:,} a matrix is {values('sparsegrad')}, and "
        f"{100 * k / shares.matrix:.3f} % of one matrix. The released code also leaves gate_proj of the selected "
        f"blocks trainable, {shares.gate:.2f} % more.",
    ]


def losses(evidence: LlamaEvidence) -> list[str]:
    """Name the failed runs, the records left out, mixed versions, and seeds that were trained and not judged."""
    failed = [path for paths in evidence.failed.values() for path in paths]
    notes = [f"Failed runs: {len(failed)} ({', '.join(failed)})." if failed else "Failed runs: none."]
    for method, label in LABELS.items():
        trained = {run.seed for run in evidence.runs.get(method, ())}
        judged = {one.record["run"]["seed"] for one in evidence.judged.get(method, ())}
        if trained != judged and judged:
            notes.append(f"{label}: trained seeds {sorted(trained)}, judged seeds {sorted(judged)}.")
    if evidence.left_out:
        notes.append(f"Records left out: {len(evidence.left_out)} ({', '.join(evidence.left_out)}).")
    versions = sorted({run.version for runs in evidence.runs.values() for run in runs})
    notes += [f"Mixed versions of the configuration: {', '.join(map(str, versions))}."] if len(versions) > 1 else []
    return notes


def _judged_methods(evidence: LlamaEvidence) -> list[str]:
    return [method for method in LABELS if _with_lines(evidence, method)]


def _with_lines(evidence: LlamaEvidence, method: str) -> list[Judged]:
    return [one for one in evidence.judged.get(method, ()) if one.lines]


def _noise(judged: Sequence[Judged]) -> float | None:
    """Largest spread over repeats among the answer files of a method; `None` if none was judged twice."""
    found = [repeat_noise(one.lines) for one in judged]
    spreads = [noise.spread for noise in found if noise is not None]
    return max(spreads) if spreads else None


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "none"
