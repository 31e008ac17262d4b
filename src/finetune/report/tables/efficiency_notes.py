"""What stands around tables 3, 7 and 8: the machine, the equal treatment, and what the printed numbers are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.published import TASKS
from finetune.report.evidence.efficiency_evidence import PAPER_MODEL, EfficiencyEvidence
from finetune.report.paper.layouts import PAPER_MODELS

if TYPE_CHECKING:
    from finetune.report.tables.efficiency_tables import Cell

_RULES = (
    "Only ratios travel between machines: rows ending in '/ Regular FT' are divided by full fine-tuning's of the same "
    "round (speed) or batch (memory), their AVG is the mean of the tasks' ratios; the paper's are quotients of two "
    "printed values.",
    "Speed is 1 / median step time of a round, with Student's t interval over rounds; an average is the mean of task "
    "means with a stratified bootstrap interval. Memory is one measured step of the longest batch, without interval. "
    "No cell is compared with the print: the paper names neither device nor batch.",
)


def places(evidence: EfficiencyEvidence) -> tuple[str, ...]:
    """Say which model was measured in RoBERTa-base's place."""
    paper = f"{PAPER_MODELS[PAPER_MODEL]} ({PAPER_MODEL})"
    if not evidence.model:
        return (f"Nothing was measured in the place of {paper}.",)
    titles = {record.facts["model"]["title"] for record in evidence.tasks.values()}
    label = f"{titles.pop()} ({evidence.model})" if titles else evidence.model
    if evidence.model == PAPER_MODEL:
        return (f"{paper} is the paper's own model, with random weights: speed and memory do not depend on them.",)
    return (
        f"{label} stands in the place of {paper}. It is not the paper's model: its numbers show how the methods "
        "compare on it and do not reproduce the printed ones. Weights are random: speed and memory do not depend on "
        "them.",
    )


def notes(number: int, evidence: EfficiencyEvidence, cells: Sequence["Cell"]) -> tuple[str, ...]:
    """The sentences under the table."""
    return (
        *_machine(evidence),
        *_prints(number),
        *_RULES,
        *(
            f"{cell.row}, {cell.column} as printed ({cell.paper}): {cell.note}."
            for cell in cells
            if "does not match" in cell.note
        ),
        *_missing(evidence),
        *([f"Records left out: {', '.join(evidence.left_out)}."] if evidence.left_out else []),
    )


def _machine(evidence: EfficiencyEvidence) -> list[str]:
    """Device and treatment, once where all tasks agree, else by task."""
    lines: dict[str, list[str]] = {}
    for task, record in evidence.tasks.items():
        device, how = record.facts["device"], record.facts["treatment"]
        text = (
            f"Measured on {device['name']} ({device['type']}, {device['threads']} threads), {how['precision']}, batch "
            f"{how['batch_size']}, padding {how['padding']} (at most {how['max_length']} tokens), {how['optimizer']}, "
            f"train={how['train']}; {how['kept']}, {how['rounds']} rounds of {how['batches']} batches, "
            f"{how['warmup_steps']} warm-up steps."
        )
        lines.setdefault(text, []).append(TASKS[task])
    found = [text if len(lines) == 1 else f"{', '.join(tasks)}: {text}" for text, tasks in lines.items()]
    shares = [
        f"{TASKS[task]} {100 * record.facts['lengths']['padded_share']:.0f} %"
        for task, record in evidence.tasks.items()
    ]
    found += [f"Share of padded tokens: {', '.join(shares)}."] if shares else []
    sources = dict.fromkeys(record.facts["lengths"]["source"] for record in evidence.tasks.values())
    found += [f"Token lengths: {'; '.join(sources)}."] if sources else []
    warnings = dict.fromkeys(w for record in evidence.tasks.values() for w in record.facts.get("warnings", ()))
    return [*found, *(f"Warning: {warning}." for warning in warnings)]


def _prints(number: int) -> list[str]:
    found = []
    if number in (3, 7):
        found.append(
            "The printed steps per second have an unknown batch size and device; in the authors' logs they divide the "
            "planned steps by the time of a run that may have stopped early (D22)."
        )
    if number in (3, 8):
        found.append(
            "The printed memory is taken to be the peak of an evaluation, as the authors' code measured it (D21); the "
            "peak in training stands beside it. MB are 10^6 bytes; the paper does not say whether its are 2^20."
        )
    return found


def _missing(evidence: EfficiencyEvidence) -> list[str]:
    """Name the variants that were not measured, and why."""
    reasons: dict[str, list[str]] = {}
    for task, record in evidence.tasks.items():
        for name, reason in record.missing.items():
            reasons.setdefault(f"{name}: {reason}", []).append(TASKS[task])
    return [f"Not measured, {reason} ({', '.join(tasks)})." for reason, tasks in reasons.items()]
