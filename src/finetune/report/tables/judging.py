"""Judged answers of Table 6: their cells; notes on the judge, on which methods are apart, and on the printed shares."""

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence

from finetune.mt_bench.agreement import agreement_of, in_words
from finetune.mt_bench.comparison import (
    PUBLISHED_NOISE,
    bootstrap_score,
    comparison_verdict,
    paired_bootstrap,
    repeat_noise,
)
from finetune.mt_bench.judged import Judged
from finetune.mt_bench.scores import summarize
from finetune.report.evidence.evidence import CHAT_TASK, Evidence
from finetune.report.model import Cell, Note, Reason
from finetune.report.paper.layouts import LLAMA_TABLE, METHODS, PAPER_MODELS, Place, printed_places
from finetune.report.paper.shares import Shares
from finetune.report.tables.comparability import digits_verdict, of_scale, reasons_against
from finetune.report.tables.frame import Frame, finish, missing
from finetune.stats import intervals, verdicts

PAPER_QUESTIONS = "mt_bench_inf"
"""Stem of the paper's question file, Inflection's corrected MT-Bench."""

PAPER_JUDGE = r"gpt-4(-.+)?"
"""The paper's judge as a pattern of names; its snapshot is not stated. GPT-4o and GPT-4.1 are other models."""


def judged_cell(place: Place, frame: Frame) -> Cell:
    """FastChat's score: mean over seeds, bootstrap interval over questions. The paper prints no deviation."""
    everything = frame.evidence.judged.get((place.own, place.method), ())
    short = [Reason("missing_judgments", f"{one.path}: {one.shortfall()}") for one in everything if one.missing]
    judged = [one for one in everything if one.lines]
    if not judged:
        return missing(place, frame, *short)
    ours = bootstrap_score([one.items() for one in judged], seed=frame.seed, categories=frame.categories)
    reasons = [*reasons_against(place, frame.evidence, sizes=False), *_against_judge(judged, frame.evidence), *short]
    verdict = verdicts.NOT_COMPARABLE
    if not reasons:
        difference = intervals.Difference(ours.mean - place.number.value)
        verdict = intervals.verdict(difference, rounding=place.number.rounding)
    judge = judged[0].record["judge"]
    how = (
        f"FastChat's mean over both turns, {ours.n} items of seeds "
        f"{', '.join(str(one.record['run']['seed']) for one in judged)}, bootstrap interval over questions, judge "
        f"{judge['model']}, median of {judge['repeats']} repeats"
    )
    if judge["measures_quality"] and (known := agreement_of(judge, frame.evidence.agreements)):
        how += f"; {in_words(known)}"
    fields = {"model": place.own, "records": tuple(one.path for one in judged)}
    return finish(place, frame.evidence.experiment.protocol, verdict, ours, how, reasons, **fields)


def _against_judge(judged: Sequence[Judged], evidence: Evidence) -> list[Reason]:
    """Say why judgments may not be compared with the paper's."""
    reasons = of_scale(one.record["run"]["scale"] for one in judged)
    judge, file = judged[0].record["judge"], judged[0].record["questions"]["file"]
    if not judge["measures_quality"]:
        reasons.append(Reason("no_quality", "the judge's scores are no measure of quality"))
    elif not re.fullmatch(PAPER_JUDGE, judge["model"]):
        reasons.append(Reason("judge", f"judge {judge['model']} is not the paper's GPT-4"))
        if agreement_of(judge, evidence.agreements) is None:
            reasons.append(Reason("no_agreement", f"judge {judge['model']} has no record of agreement with another"))
    if file.rsplit("/", 1)[-1].removesuffix(".jsonl") != PAPER_QUESTIONS:
        reasons.append(Reason("questions", f"questions {file} are not the paper's {PAPER_QUESTIONS}"))
    return reasons


def judging_notes(evidence: Evidence, categories: Mapping[int, str] | None, seed: int) -> list[Note]:
    """Everything that the table says of the judge: settings, what failed, scores by turn and category, pairs.

    `categories`: question id -> category.
    """
    judged = {key: [one for one in found if one.lines] for key, found in evidence.judged.items()}
    everything = [one for found in evidence.judged.values() for one in found]
    if not everything:
        return [Note("judge", "Nothing was judged.")]
    notes = [*(Note("judge", text) for text in _judge(everything)), *_agreement(everything, evidence)]
    for model in evidence.decoders:
        names = dict.fromkeys([*METHODS.values(), *evidence.experiment.named])
        methods = [name for name in names if judged.get((model, name))]
        of = {name: judged[model, name] for name in methods}
        labels = {name: _label(evidence, model, name) for name in methods}
        notes += [Note("judge", f"{labels[name]}: {_details(of[name], categories)}.") for name in methods]
        if len(methods) > 1:
            notes += _pairs(of, labels, categories, seed)
        notes += _other_seeds(evidence, model)
    return notes


def _judge(everything: Sequence[Judged]) -> list[str]:
    record = everything[0].record
    judge, questions = record["judge"], record["questions"]
    times = "each item judged once" if judge["repeats"] == 1 else f"{judge['repeats']} repeats of each item"
    quality = "" if judge["measures_quality"] else " Its scores are no measure of quality."
    ratings, expected = sum(len(one.lines) for one in everything), sum(one.expected for one in everything)
    cut, refused = (sum(one.record["answers"][name] for one in everything) for name in ("cut", "refused"))
    parsings = sorted({one.parsing for one in everything})
    return [
        f"Judge: {judge['model']}, temperature {judge['temperature']}, {times}; {questions['count']} questions of "
        f"{questions['file']} (sha256 {questions['sha256'][:12]}).{quality}",
        f"Judgments: {ratings} of {expected} have a rating, read by parsing {' and '.join(parsings)}; FastChat's, the "
        f"first one named, and the last of the judge's own differ in {sum(one.differing for one in everything)}.",
        *(f"{one.path}: {one.shortfall()}." for one in everything if one.shortfall()),
        f"Prompts longer than the model's window: {cut} cut, {refused} refused.",
    ]


def _agreement(everything: Sequence[Judged], evidence: Evidence) -> list[Note]:
    """How far the judge agrees with another one, or that nobody knows; of a rule there is nothing to say."""
    judge = everything[0].record["judge"]
    if not judge["measures_quality"]:
        return []
    if known := agreement_of(judge, evidence.agreements):
        return [Note("agreement", f"Judge {judge['model']}: {in_words(known)}.")]
    if re.fullmatch(PAPER_JUDGE, judge["model"]):  # judges are held against it
        return []
    return [
        Note(
            "warning",
            f"The judge {judge['model']} has no record of agreement with another judge: what its scores are worth is "
            "not known. Validate it: python experiments/judge_agreement.py.",
        )
    ]


def _details(judged: Sequence[Judged], categories: Mapping[int, str] | None) -> str:
    """Scores by turn and category, and how far a mean moves when the same answers are judged again."""
    scores = [summarize(one.items(), categories) for one in judged]
    parts = [f"turn {turn} {_mean([score.turns.get(turn) for score in scores])}" for turn in (1, 2)]
    names = dict.fromkeys(name for score in scores for name in score.categories)
    parts += [f"{name} {_mean([score.categories.get(name) for score in scores])}" for name in names]
    noise = _noise(judged)
    return ", ".join(parts + ([f"spread of a mean over repeats {noise:.3f}"] if noise is not None else []))


def _pairs(
    judged: Mapping[str, Sequence[Judged]], labels: Mapping[str, str], categories: Mapping[int, str] | None, seed: int
) -> list[Note]:
    """Compare each two methods' scores."""
    items = {method: [one.items() for one in found] for method, found in judged.items()}
    noise = {method: _noise(found) for method, found in judged.items()}
    known = {method: PUBLISHED_NOISE if value is None else value for method, value in noise.items()}
    quality = all(one.record["judge"]["measures_quality"] for found in judged.values() for one in found)
    rule = (
        "Two methods are separated if the 95 % interval of their paired difference (bootstrap over questions, seeds "
        "averaged first) excludes 0 and |difference| is at least the judge's noise: the largest spread (largest minus "
        "smallest) of one answer file's mean over the repeats of its judgments"
    )
    if None in noise.values():
        rule += (
            f", and {PUBLISHED_NOISE} points, known of GPT-4 on fixed answers (FastChat issues 3018 and 2969), where "
            "nothing was judged twice"
        )
    without = "" if quality else " The judge's scores are no measure of quality: no pair says which method is better."
    notes = [Note("rule", f"{rule}.{without}")]
    for first, second in itertools.combinations(judged, 2):
        label = f"{labels[first]} - {labels[second]}"
        if not set.intersection(*(set(found) for found in (*items[first], *items[second]))):
            words = f"{label}: {verdicts.INCONCLUSIVE}, no item was judged for every seed of both."
            notes.append(Note("pair", words))
            continue
        found = paired_bootstrap(items[first], items[second], seed=seed, categories=categories)
        threshold = max(known[first], known[second])
        verdict = comparison_verdict(found, threshold)
        interval = f" [{found.low:+.3f}, {found.high:+.3f}]" if found.low is not None else ", no interval"
        unpaired = f", {found.unpaired} items not paired" if found.unpaired else ""
        words = verdict if quality else f"{verdicts.NOT_COMPARABLE} in quality (by the rule: {verdict})"
        words = (
            f"{label}: {found.difference:+.3f}{interval}, noise {threshold:.3f}: {words} "
            f"({found.items} items of {found.questions} questions{unpaired})."
        )
        notes.append(Note("pair", words))
    return notes


def _other_seeds(evidence: Evidence, model: str) -> list[Note]:
    """Name the methods whose trained and judged seeds differ."""
    notes = []
    for method in evidence.experiment.named:
        trained = sorted(run.seed for run in evidence.runs.get((model, method, CHAT_TASK), ()))
        judged = sorted(one.record["run"]["seed"] for one in evidence.judged.get((model, method), ()))
        if judged and trained != judged:
            words = f"{_label(evidence, model, method)}: trained seeds {trained}, judged seeds {judged}."
            notes.append(Note("loss", words))
    return notes


def reading_notes(shares: Shares) -> list[Note]:
    """Say from which reading of the text each printed share follows (D17 to D19)."""
    text, gated, every = shares.variants
    printed = {one.method: one for one in printed_places(LLAMA_TABLE) if one.quantity == "trained_share"}

    def follows(method: str) -> str:
        one = printed[method]
        agreeing = [
            variant.name
            for variant in shares.variants
            if digits_verdict(one.paper, variant.shares[method])[0] == verdicts.AGREES
        ]
        found = " or ".join(agreeing) or "none of the readings counted here"
        return f"the {one.paper} of {one.row} follows from {found}"

    kept = ", ".join(f"{variant.shares['sparsegrad']:.3g} % {variant.name}" for variant in shares.variants)
    found = [
        f"Columns ending in share are exact counts of {PAPER_MODELS['llama2_7b']}-7B ({shares.total:,} parameters), "
        "whichever model ran.",
        f"D17: {follows('full')}; the text names {text.name} ({text.shares['full']:.2f} %), the released code trains "
        f"gate_proj too ({gated.shares['full']:.2f} %).",
        f"D18: {follows('lora')} at rank {shares.rank} ({every.shares['lora']:.3f} %); the text names the selected "
        f"blocks ({text.shares['lora']:.3f} %).",
        f"D19: {follows('sparsegrad')}, and {follows('meprop')}: k = {shares.k:,} a matrix is {kept}, and "
        f"{100 * shares.k / shares.matrix:.3f} % of one matrix. The released code also leaves gate_proj of the "
        f"selected blocks trainable, {shares.gate:.2f} % more.",
    ]
    return [Note("reading", words) for words in found]


def _label(evidence: Evidence, model: str, method: str) -> str:
    label = evidence.experiment.labels.method(method)
    return label if len(evidence.decoders) == 1 else f"{label}, {model}"


def _noise(judged: Sequence[Judged]) -> float | None:
    """Largest spread over repeats among the answer files of a method; `None` if none was judged twice."""
    spreads = [noise for one in judged if (noise := repeat_noise(one.lines)) is not None]
    return max(spreads) if spreads else None


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "none"
