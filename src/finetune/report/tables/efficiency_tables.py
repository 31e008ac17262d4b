"""Tables 3, 7 and 8, steps per second and memory, from the records of the efficiency stage.

evidence = collect_efficiency_evidence(experiment=..., protocol=..., models=..., records=...)
rows, context = build_efficiency_table(7, evidence)
write_table(folder, 7, rows, context)

Below the printed rows stand the forms that the paper has not, and every row over full fine-tuning's: absolute times and
bytes belong to one machine, ratios travel.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.published import TASKS, paper_table
from finetune.report.evidence.efficiency_evidence import METHODS, PAPER_MODEL, EfficiencyEvidence, Measured
from finetune.report.tables import efficiency_notes
from finetune.report.tables.writers import Context
from finetune.stats import intervals as stats
from finetune.stats import verdicts

TITLES = {
    3: "steps per second and memory, average over GLUE, RoBERTa-base",
    7: "steps per second on GLUE, RoBERTa-base",
    8: "peak memory on GLUE in MB, RoBERTa-base",
}
ROWS = {
    "Regular FT": "full",
    "LoRA": "lora",
    "SparseGrad SD": "rotated_sparse_by_dense",
    "SparseGrad, Sparse-by-Dense": "rotated_sparse_by_dense",
    "SparseGrad Reg": "rotated_regular",
    "SparseGrad, Regular": "rotated_regular",
}
"""Printed row label -> variant."""

OWN_ROWS = {
    "MeProp": "meprop",
    "SparseGrad, folded": "folded",
    "SparseGrad, truncated": "truncated",
    "SparseGrad, truncated (inputs)": "truncated_input",
}
"""Rows that the paper has not."""

SPEED, EVALUATION, TRAINING, SCORE = "speed", "evaluation", "training", "score"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        variant: Name of the variant.
        quantity: `speed` in steps per second, the peak of `evaluation` or `training` in MB, or the validation `score`
            in percent that training runs of the same model reached.
        task: One of `TASKS`; empty for the average.
        over_full: Whether the value is divided by full fine-tuning's.
        paper, source, note: As in `finetune.report.paper.layouts.Cell`.
    """

    row: str
    column: str
    variant: str
    quantity: str
    task: str = ""
    over_full: bool = False
    paper: str = ""
    source: str = ""
    note: str = ""


def build_efficiency_table(
    number: int, evidence: EfficiencyEvidence, *, seed: int = 0
) -> tuple[list[dict[str, Any]], Context]:
    """Build table 3, 7 or 8; what was not measured stands there as `not run`, with the reason in `source`.

    Args:
        number: One of `TITLES`.
        evidence: What was measured (`collect_efficiency_evidence`).
        seed: Seed of the bootstrap behind the intervals of averages.

    Returns:
        The rows, one dict with the keys `rows.COLUMNS` per cell, and the context for `write_table`.

    Raises:
        ValueError: If the number is another.
    """
    found = cells(number)
    rows = [_build_row(cell, evidence, seed) for cell in found]
    context = Context(
        experiment=evidence.experiment,
        protocol=evidence.protocol,
        title=TITLES[number],
        models=efficiency_notes.places(evidence),
        notes=efficiency_notes.notes(number, evidence, found),
        counted="rounds over the same batches of a task; 1 for memory, which a step repeats exactly",
    )
    return rows, context


def cells(number: int) -> list[Cell]:
    """The printed cells, those of the forms that the paper has not, and all of them over full fine-tuning's.

    Raises:
        ValueError: If the number is another than 3, 7 or 8.
    """
    if number not in TITLES:
        raise ValueError(f"unknown table number {number!r}; built here are {tuple(TITLES)}")
    lines = paper_table(number)
    columns = list(dict.fromkeys(line["column"] for line in lines))
    found = [_printed(number, line) for line in lines]
    for row, variant in OWN_ROWS.items():
        found += [Cell(row, column, variant, *_column(number, column)) for column in columns]
    if number == 3:
        found += [replace(_bare(c), column="Peak in training, MB", quantity=TRAINING) for c in _last_columns(found)]
    over = list(_over_full(found))
    if number == 3:
        found += [replace(_bare(c), column="Score", quantity=SCORE) for c in _last_columns(found)]
    if number != 8:
        return [*found, *over]
    return [*found, *over, *(_in_training(cell) for cell in (*found, *over))]


def _printed(number: int, line: Mapping[str, str]) -> Cell:
    texts = {"paper": line["value"], "source": f"{line['source']} table{number}", "note": line["note"]}
    return Cell(line["row"], line["column"], ROWS[line["row"]], *_column(number, line["column"]), **texts)


def _column(number: int, column: str) -> tuple[str, str]:
    """Quantity and task of a printed column."""
    if number == 3:
        return (SPEED if column == "Steps/Sec." else EVALUATION), ""
    return (SPEED if number == 7 else EVALUATION), "" if column == "AVG" else column.lower()


def _bare(cell: Cell) -> Cell:
    return replace(cell, paper="", source="", note="")


def _in_training(cell: Cell) -> Cell:
    return replace(_bare(cell), row=f"{cell.row}, peak in training", quantity=TRAINING)


def _last_columns(found: list[Cell]) -> list[Cell]:
    return list({cell.row: cell for cell in found}.values())


def _over_full(found: list[Cell]) -> Iterator[Cell]:
    """Every row but full fine-tuning's, divided by it; the paper's are quotients of two printed values."""
    full = {cell.column: cell for cell in found if cell.variant == "full"}
    for cell in found:
        if cell.variant == "full":
            continue
        below = full[cell.column]
        ratio = {"row": f"{cell.row} / {below.row}", "over_full": True, "note": ""}
        if cell.paper:
            source = f"{cell.source}, {cell.paper} / {below.paper}"
            yield replace(cell, **ratio, paper=f"{float(cell.paper) / float(below.paper):.2f}", source=source)
        else:
            yield replace(cell, **ratio)


def _build_row(cell: Cell, evidence: EfficiencyEvidence, seed: int) -> dict[str, Any]:
    values, paths = _values(cell, evidence)
    ours, verdict = stats.Estimate(None, None, None, None), verdicts.NOT_RUN
    source = [f"paper: {cell.source}{f' ({cell.note})' if cell.note else ''}"] if cell.source else []
    if values:
        verdict = verdicts.NOT_COMPARABLE
        ours = _estimate(cell, values, seed)
        source += [_how(cell, values, ours), *_partial(cell, values), _against(cell, evidence)]
    else:
        source.append(_why_not(cell, evidence))
    return {
        "row": cell.row,
        "column": cell.column,
        "ours": ours.mean,
        "ours_low": ours.low,
        "ours_high": ours.high,
        "n": ours.n,
        "paper": cell.paper,
        "paper_std": "",
        "released": None,
        "source": "; ".join(source),
        "verdict": verdict,
        "protocol": evidence.protocol,
        "model": evidence.model or "",
        "records": ";".join(paths),
    }


def _values(cell: Cell, evidence: EfficiencyEvidence) -> tuple[dict[str, tuple[float, ...]], list[str]]:
    """Task -> values of the rounds (of a score, of the seeds), of the tasks that have any; and where they stand."""
    found = {}
    if cell.quantity == SCORE:
        pairs = {task: evidence.scores.get((cell.variant, task), ()) for task in TASKS}
        found = {task: tuple(score for _, score in of_task) for task, of_task in pairs.items() if of_task}
        return found, [path for task in found for path, _ in pairs[task]]
    for task, record in evidence.tasks.items():
        own, full = record.variants.get(cell.variant), record.variants.get("full")
        if cell.task not in ("", task) or own is None or (cell.over_full and full is None):
            continue
        found[task] = _of(cell, own, full)
    return found, [evidence.tasks[task].path for task in found]


def _of(cell: Cell, own: Measured, full: Measured | None) -> tuple[float, ...]:
    if cell.quantity == SPEED:
        return own.ratios if cell.over_full else own.steps_per_second
    name = f"peak_{cell.quantity}"
    return (getattr(own, name) / (getattr(full, name) if cell.over_full else 1.0),)


def _estimate(cell: Cell, values: Mapping[str, tuple[float, ...]], seed: int) -> stats.Estimate:
    if cell.task:
        return stats.mean_interval(values[cell.task])
    return stats.bootstrap([*values.values()], seed=seed)


def _how(cell: Cell, values: Mapping[str, tuple[float, ...]], ours: stats.Estimate) -> str:
    if cell.quantity == SCORE:
        return f"ours: best validation score, mean of {len(values)} task means over seeds, bootstrap interval"
    what = {
        SPEED: "1 / median step time of a round",
        EVALUATION: "peak of a forward pass without gradients, optimizer state in memory (D21)",
        TRAINING: "peak of a whole step",
    }[cell.quantity]
    how = "mean over rounds, t interval" if cell.task else f"mean of {len(values)} task means, bootstrap interval"
    how = how if ours.low is not None else how.partition(", ")[0]
    over = ", over full fine-tuning's of the same round" if cell.over_full and cell.quantity == SPEED else ""
    over = over or (", over full fine-tuning's" if cell.over_full else "")
    return f"ours: {what}{over}, {how}"


def _partial(cell: Cell, values: Mapping[str, Any]) -> list[str]:
    """Name the tasks of a partial average, and the paper's mean over the same ones where tables 7 or 8 print them."""
    if cell.task or len(values) == len(TASKS):
        return []
    text = f"over {', '.join(TASKS[task] for task in values)} only"
    printed = _printed_by_task(cell)
    if cell.over_full or not cell.paper or not printed:
        return [text]
    return [f"{text}, the paper's mean over these is {statistics.fmean(printed[task] for task in values):.2f}"]


def _printed_by_task(cell: Cell) -> dict[str, float]:
    lines = paper_table(7 if cell.quantity == SPEED else 8)
    own = [line for line in lines if ROWS[line["row"]] == cell.variant and line["column"] != "AVG"]
    return {line["column"].lower(): float(line["value"]) for line in own}


def _against(cell: Cell, evidence: EfficiencyEvidence) -> str:
    """Why the cell may not be compared with the print: there is always a reason."""
    if cell.quantity == SCORE:
        return "not comparable: the paper's Table 3 prints no score; tables 5 and 10 do"
    record = next(iter(evidence.tasks.values())).facts
    reasons = [] if cell.paper else ["the paper prints no value"]
    if evidence.model != PAPER_MODEL:
        reasons.append(f"{evidence.model} is not the paper's {PAPER_MODEL}")
    if record["run"]["scale"] != "paper":
        reasons.append(f"scale {record['run']['scale']} is not the paper's")
    reasons.append(f"{record['device']['name']}, batch {record['treatment']['batch_size']}: the paper names neither")
    if cell.paper and cell.quantity == SPEED:
        reasons.append("how the printed steps were counted is unknown (D22)")
    if cell.paper and cell.quantity == EVALUATION:
        reasons.append("the printed peak is taken to be an evaluation's (D21)")
    return f"not comparable: {', '.join(reasons)}"


def _why_not(cell: Cell, evidence: EfficiencyEvidence) -> str:
    if cell.quantity == SCORE:
        return f"no finished training run of {METHODS[cell.variant]} on {evidence.model or 'any model'}"
    if not evidence.model:
        return "nothing was measured in RoBERTa-base's place"
    records = [record for task, record in evidence.tasks.items() if cell.task in ("", task)]
    reasons = dict.fromkeys(record.missing[cell.variant] for record in records if cell.variant in record.missing)
    if reasons:
        return f"{cell.variant} of {evidence.model}: {'; '.join(reasons)}"
    what = f"{evidence.model}{f' on {TASKS[cell.task]}' if cell.task else ''}"
    return f"{cell.variant} of {what} was not measured" if records else f"no record of {what}"
