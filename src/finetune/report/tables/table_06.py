"""Table 6, LLaMa-2 on OpenAssistant: trainable share, validation loss, and score of the judged answers.

evidence = collect_llama_evidence(experiment=..., protocol=..., stands_for=..., records=..., judgments=...)
rows, context = build_table_06(evidence, full_model=(path, config))
write_table(folder, 6, rows, context)

Beside the printed columns stand the trainable shares of LLaMa-2-7B itself under three readings of which matrices train:
the printed 22 % and 0.5 % follow from other readings than the text's (D17 to D19).
"""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.mt_bench.comparison import bootstrap_score
from finetune.mt_bench.judged import Judged
from finetune.published import paper_table
from finetune.report.evidence.llama_evidence import PAPER_MODEL, LlamaEvidence, LlamaRun
from finetune.report.paper import printed
from finetune.report.paper.layouts import METHODS, PAPER_MODELS, Cell
from finetune.report.paper.shares import Shares, trainable_shares
from finetune.report.tables import table_06_notes
from finetune.report.tables.comparability import PAPER_PROTOCOLS, count_verdict
from finetune.report.tables.writers import Context
from finetune.stats import intervals as stats
from finetune.stats import verdicts

NUMBER = 6
TITLE = "LLaMa-2 on OpenAssistant conversations, answers to MT-Bench Inf judged"
QUANTITIES = {"#Train params": "trainable", "Valid Loss": "loss", "I-Bench Score": "judged"}
"""Column -> quantity."""

PAPER_RUNS = 3
"""Runs behind a printed loss. The paper states none for Table 6; its Appendix D says 3 seeds for GLUE."""

PAPER_QUESTIONS = "mt_bench_inf"
"""Stem of the paper's question file, Inflection's corrected MT-Bench."""

PAPER_JUDGE = r"gpt-4(-.+)?"
"""The paper's judge as a pattern of names; its snapshot is not stated. GPT-4o and GPT-4.1 are other models."""

LOSS_MARGIN = 0.05
"""Largest difference of losses that counts as agreement: the largest deviation printed in the column, in nats."""


def build_table_06(
    evidence: LlamaEvidence,
    *,
    full_model: tuple[str, Mapping[str, Any]] | None = None,
    categories: Mapping[int, str] | None = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], Context]:
    """Build Table 6; what did not run stands there as `not run`, with the reason in `source`.

    Args:
        evidence: What ran (`collect_llama_evidence`).
        full_model: Path and configuration of LLaMa-2-7B, for the computed shares; `None` leaves them `not run`.
        categories: Question id -> category: adds the scores by category to the notes, and stratifies the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        The rows, one dict with the keys `rows.COLUMNS` per cell, and the context for `write_table`.

    Raises:
        ValueError: As `trainable_shares`, or if a judged question has no category.
    """
    builders = {"trainable": _trainable_row, "loss": _loss_row, "judged": _judged_row}
    shares = trainable_shares(full_model[1]) if full_model else None
    rows = []
    for cell in cells():
        if cell.quantity == "judged":
            rows.append(_judged_row(cell, evidence, categories, seed))
        else:
            rows.append(builders[cell.quantity](cell, evidence))
    rows += _share_rows(shares, full_model[0] if full_model else "")
    notes = [
        *table_06_notes.rules(LOSS_MARGIN, PAPER_RUNS, stratified=categories is not None),
        *table_06_notes.judging(evidence, categories),
        *table_06_notes.pairs(evidence, categories, seed),
        *(table_06_notes.readings(shares, rows) if shares else []),
        *table_06_notes.losses(evidence),
    ]
    context = Context(
        experiment=evidence.experiment,
        protocol=evidence.protocol,
        title=TITLE,
        models=_places(evidence),
        notes=tuple(notes),
        counted="seeds; judged items of all seeds in the column I-Bench Score",
    )
    return rows, context


def cells() -> list[Cell]:
    """The printed cells in the order of the print."""
    found = []
    for line in paper_table(NUMBER):
        texts = {"paper": line["value"], "paper_std": line["std"], "note": line["note"]}
        texts["source"] = f"{line['source']} table{NUMBER}"
        place = {"model": PAPER_MODEL, "method": METHODS[line["row"]]}
        found.append(Cell(NUMBER, line["row"], line["column"], QUANTITIES[line["column"]], **place, **texts))
    return found


def _trainable_row(cell: Cell, evidence: LlamaEvidence) -> dict[str, Any]:
    """Share of the model's parameters that train, as the records counted them."""
    runs = evidence.runs.get(cell.method, ())
    if not runs:
        return _row(cell, evidence, verdicts.NOT_RUN, _why_not_run(cell, evidence))
    counts = sorted({(run.trainable, run.total) for run in runs})
    share = statistics.median_low(sorted(run.share for run in runs))
    reasons = _against(cell, evidence, runs, sizes=False)
    verdict, mark = count_verdict(cell, share, comparable=not reasons)
    source = [f"ours: {' or '.join(f'{trained:,} of {total:,}' for trained, total in counts)} parameters"]
    row = _row(cell, evidence, verdict, [*source, *reasons, *mark], stats.Estimate(share, None, None, len(runs)))
    return row | {"records": _paths(runs)}


def _loss_row(cell: Cell, evidence: LlamaEvidence) -> dict[str, Any]:
    """Best validation loss: mean over seeds with Student's interval, Welch's interval for the verdict."""
    runs = evidence.runs.get(cell.method, ())
    if not runs:
        return _row(cell, evidence, verdicts.NOT_RUN, _why_not_run(cell, evidence))
    losses = [run.loss for run in runs]
    ours = stats.mean_interval(losses)
    reasons = _against(cell, evidence, runs)
    paper, verdict = printed.parse(cell.paper), verdicts.NOT_COMPARABLE
    if not reasons:
        deviation = float(cell.paper_std) if cell.paper_std else None
        difference = stats.difference_from_paper([losses], paper.value, [deviation], PAPER_RUNS)
        verdict = stats.verdict(difference, rounding=paper.rounding, margin=LOSS_MARGIN)
    interval = "t interval" if ours.n > 1 else "no interval"
    source = [f"ours: mean of seeds {', '.join(str(run.seed) for run in runs)}, {interval}", *reasons]
    if failed := evidence.failed.get(cell.method, ()):
        source.append(f"failed runs left out: {len(failed)}")
    return _row(cell, evidence, verdict, source, ours) | {"records": _paths(runs)}


def _judged_row(cell: Cell, evidence: LlamaEvidence, categories: Mapping[int, str] | None, seed: int) -> dict[str, Any]:
    """FastChat's score: mean over seeds, bootstrap interval over questions. The paper prints no deviation."""
    judged = [one for one in evidence.judged.get(cell.method, ()) if one.lines]
    if not judged:
        return _row(cell, evidence, verdicts.NOT_RUN, _why_not_judged(cell, evidence))
    ours = bootstrap_score([one.items() for one in judged], seed=seed, categories=categories)
    reasons = _against_judged(cell, evidence, judged)
    paper = printed.parse(cell.paper)
    verdict = stats.verdict(stats.Difference(ours.mean - paper.value), comparable=not reasons, rounding=paper.rounding)
    record = judged[0].record
    source = [
        f"ours: FastChat's mean over both turns, {ours.n} items of seeds "
        f"{', '.join(str(one.record['run']['seed']) for one in judged)}, bootstrap interval over questions",
        f"judge {record['judge']['model']}, median of {record['judge']['repeats']} repeats",
        *(f"{one.path}: {one.shortfall()}" for one in evidence.judged[cell.method] if one.shortfall()),
        *reasons,
    ]
    row = _row(cell, evidence, verdict, source, ours)
    return row | {"records": ";".join(one.path for one in judged)}


def _share_rows(shares: Shares | None, path: str) -> list[dict[str, Any]]:
    """Computed shares of LLaMa-2-7B, one column for each reading, beside the same printed number."""
    rows = []
    for variant in shares.variants if shares else ():
        for cell in cells():
            if cell.quantity != "trainable":
                continue
            share = variant.shares[cell.method]
            verdict, mark = count_verdict(cell, share, comparable=True)
            source = [f"paper: {cell.source}", "ours: exact count of the architecture", *mark]
            rows.append(
                {
                    "row": cell.row,
                    "column": f"{PAPER_MODELS[PAPER_MODEL]} {variant.name} share",
                    **dict.fromkeys(("ours_low", "ours_high", "n", "released")),
                    "ours": share,
                    "paper": cell.paper,
                    "paper_std": "",
                    "source": "; ".join(source),
                    "verdict": verdict,
                    "protocol": "",
                    "model": PAPER_MODEL,
                    "records": path,
                }
            )
    return rows


def _row(
    cell: Cell,
    evidence: LlamaEvidence,
    verdict: str,
    source: Iterable[str],
    ours: stats.Estimate | None = None,
) -> dict[str, Any]:
    ours = ours or stats.Estimate(None, None, None, None)
    return {
        "row": cell.row,
        "column": cell.column,
        "ours": ours.mean,
        "ours_low": ours.low,
        "ours_high": ours.high,
        "n": ours.n,
        "paper": cell.paper,
        "paper_std": cell.paper_std,
        "released": None,
        "source": "; ".join([f"paper: {cell.source}", *source]),
        "verdict": verdict,
        "protocol": evidence.protocol,
        "model": evidence.model if ours.mean is not None else "",
        "records": "",
    }


def _against(cell: Cell, evidence: LlamaEvidence, runs: Sequence[LlamaRun], *, sizes: bool = True) -> list[str]:
    """Say why a training cell may not be compared with the print; empty if it may."""
    reasons = _model_and_protocol(cell, evidence)
    if sizes:
        scales = sorted({run.scale for run in runs} - {"paper"})
        reasons += [f"scale {', '.join(scales)} is not the paper's"] if scales else []
        reasons += ["the model started from random weights"] if any(run.random_weights for run in runs) else []
        reasons += [f"metric {name} is not loss" for name in sorted({run.metric for run in runs} - {"loss"})]
    return [f"not comparable: {', '.join(reasons)}"] if reasons else []


def _against_judged(cell: Cell, evidence: LlamaEvidence, judged: Sequence[Judged]) -> list[str]:
    """Likewise for a judged cell."""
    reasons = _model_and_protocol(cell, evidence)
    scales = sorted({one.record["run"]["scale"] for one in judged} - {"paper"})
    reasons += [f"scale {', '.join(scales)} is not the paper's"] if scales else []
    record = judged[0].record
    if not record["judge"]["measures_quality"]:
        reasons.append("the judge's scores are no measure of quality")
    elif not re.fullmatch(PAPER_JUDGE, record["judge"]["model"]):
        reasons.append(f"judge {record['judge']['model']} is not the paper's GPT-4")
    file = record["questions"]["file"]
    if file.rsplit("/", 1)[-1].removesuffix(".jsonl") != PAPER_QUESTIONS:
        reasons.append(f"questions {file} are not the paper's {PAPER_QUESTIONS}")
    if short := sum(one.missing for one in judged):
        reasons.append(f"{short} judgments are missing")
    return [f"not comparable: {', '.join(reasons)}"] if reasons else []


def _model_and_protocol(cell: Cell, evidence: LlamaEvidence) -> list[str]:
    reasons = [] if evidence.model == cell.model else [f"{evidence.model} is not the paper's {cell.model}"]
    known = evidence.protocol in PAPER_PROTOCOLS
    return reasons + ([] if known else [f"protocol {evidence.protocol} is not the paper's"])


def _why_not_run(cell: Cell, evidence: LlamaEvidence) -> list[str]:
    if not evidence.model:
        return [f"no model ran in {cell.model}'s place"]
    failed = evidence.failed.get(cell.method, ())
    lost = f", failed runs: {len(failed)} ({', '.join(failed)})" if failed else ""
    return [f"no finished run of {evidence.model} ({cell.method}){lost}"]


def _why_not_judged(cell: Cell, evidence: LlamaEvidence) -> list[str]:
    if not evidence.model:
        return [f"no model ran in {cell.model}'s place"]
    judged = evidence.judged.get(cell.method, ())
    lost = [f"{one.path}: {one.shortfall()}" for one in judged]
    return lost or [f"no judgments of answers by {evidence.model} ({cell.method})"]


def _places(evidence: LlamaEvidence) -> tuple[str, ...]:
    """Say which model stands in LLaMa-2's place."""
    paper = f"{PAPER_MODELS[PAPER_MODEL]} ({PAPER_MODEL})"
    runs = [run for found in evidence.runs.values() for run in found]
    if not evidence.model:
        return (f"Nothing ran in the place of {paper}.",)
    label = f"{runs[0].title} ({evidence.model})" if runs else evidence.model
    if evidence.model == PAPER_MODEL:
        sentences = [f"{paper} is the paper's own model."]
    else:
        sentences = [
            f"{label} stands in the place of {paper}. It is not the paper's model: its numbers show how the methods "
            "compare on it and do not reproduce the printed ones."
        ]
    sentences += [f"{label} started from random weights."] if any(run.random_weights for run in runs) else []
    scales = sorted({run.scale for run in runs} - {"paper"})
    sentences += [f"{label} ran at scale {', '.join(scales)}, which is not the paper's."] if scales else []
    return tuple(sentences)


def _paths(runs: Sequence[LlamaRun]) -> str:
    return ";".join(run.path for run in runs)
