"""Tables 3, 7 and 8, steps per second and memory, from the records of the efficiency stage.

Below the printed rows stand the forms that the paper has not, and every row over full fine-tuning's: absolute times and
bytes belong to one machine, ratios travel.
"""

import statistics
from collections.abc import Mapping

from finetune.published import TASKS
from finetune.report.evidence.efficiency_evidence import PAPER_MODEL, EfficiencyEvidence, Measured
from finetune.report.evidence.evidence import Evidence, Run
from finetune.report.labels import Labels
from finetune.report.model import Cell, Note, Reason, Table
from finetune.report.paper.k_notes import average_notes
from finetune.report.paper.layouts import Place, printed_places, title
from finetune.report.tables.cells import finish
from finetune.report.tables.comparability import of_scale
from finetune.report.tables.places import efficiency_places
from finetune.stats import intervals, verdicts

_RULES = (
    "Only ratios travel between machines: rows ending in '/ Regular FT' are divided by full fine-tuning's of the same "
    "round (speed) or batch (memory), their AVG is the mean of the tasks' ratios; the paper's are quotients of two "
    "printed values.",
    "Speed is 1 / median step time of a round, with Student's t interval over rounds; an average is the mean of task "
    "means with a stratified bootstrap interval. Memory is one measured step of the longest batch, without interval. "
    "No cell is compared with the print: the paper names neither device nor batch.",
)
_HOW = {
    "average": "best validation score",
    "speed": "1 / median step time of a round",
    "evaluation": "peak of a forward pass without gradients, optimizer state in memory (D21)",
    "training": "peak of a whole step",
}


def build_efficiency_table(number: int, measured: EfficiencyEvidence, evidence: Evidence, *, seed: int = 0) -> Table:
    """Build table 3, 7 or 8; what was not measured stands there as `not run`, with its reason."""
    experiment = evidence.experiment
    places = efficiency_places(number, [*measured.methods], [*measured.tasks], experiment)
    return Table(
        number=number,
        name=f"table_{number:02d}",
        title=title(number),
        experiment=experiment.name,
        protocol=experiment.protocol,
        cells=tuple(_cell(place, measured, evidence, seed) for place in places),
        models=(measured.sentence,),
        notes=(
            *_machine(measured, experiment.labels),
            *(Note("print", text) for text in _prints(number)),
            *(Note("rule", text) for text in _RULES),
            *average_notes(number),
            *_missing(measured, experiment.labels),
        ),
        counted="rounds over the same batches of a task; 1 for memory, which a step repeats exactly",
    )


def _cell(place: Place, measured: EfficiencyEvidence, evidence: Evidence, seed: int) -> Cell:
    if place.quantity == "average":
        runs = _runs(place, measured, evidence)
        values = {task: tuple(run.score for run in found) for task, found in runs.items()}
        paths = [run.path for found in runs.values() for run in found]
    else:
        values = _values(place, measured)
        paths = [measured.tasks[task].path for task in values]
    fields = {"model": measured.model, "records": tuple(paths)}
    if not values:
        return finish(place, measured.protocol, verdicts.NOT_RUN, reasons=_why_not(place, measured), **fields)
    ours = _estimate(place, values, seed)
    reasons = [*_against(place, measured), *_partial(place, values)]
    how = _how(place, values, ours)
    return finish(place, measured.protocol, verdicts.NOT_COMPARABLE, ours, how, reasons, **fields)


def _runs(place: Place, measured: EfficiencyEvidence, evidence: Evidence) -> dict[str, tuple[Run, ...]]:
    """Task -> the training runs that took a variant's steps."""
    method = measured.methods.get(place.method, place.method)
    found = {task: evidence.runs.get((measured.model, method, task), ()) for task in TASKS}
    return {task: runs for task, runs in found.items() if runs}


def _values(place: Place, measured: EfficiencyEvidence) -> dict[str, tuple[float, ...]]:
    """Task -> values of the rounds, of the tasks that have any; an average is over the paper's tasks."""
    found = {}
    for task, record in measured.tasks.items():
        own, full = record.variants.get(place.method), record.variants.get("full")
        wanted = task == place.task or (not place.task and task in TASKS)
        if wanted and own is not None and not (place.over_full and full is None):
            found[task] = _of(place, own, full)
    return found


def _of(place: Place, own: Measured, full: Measured | None) -> tuple[float, ...]:
    if place.quantity == "speed":
        return own.ratios if place.over_full else own.steps_per_second
    name = f"peak_{place.quantity}"
    return (getattr(own, name) / (getattr(full, name) if place.over_full else 1.0),)


def _estimate(place: Place, values: Mapping[str, tuple[float, ...]], seed: int) -> intervals.Estimate:
    if place.task:
        return intervals.mean_interval(values[place.task])
    return intervals.bootstrap([*values.values()], seed=seed)


def _how(place: Place, values: Mapping[str, tuple[float, ...]], ours: intervals.Estimate) -> str:
    over = ", over full fine-tuning's" if place.over_full else ""
    over += " of the same round" if place.over_full and place.quantity == "speed" else ""
    mean = "mean over rounds" if place.task else f"mean of {len(values)} task means"
    interval = f", {'t' if place.task else 'bootstrap'} interval" if ours.low is not None else ""
    return f"{_HOW[place.quantity]}{over}, {mean}{interval}"


def _partial(place: Place, values: Mapping[str, object]) -> list[Reason]:
    """Name the tasks of a partial average, and the paper's mean over the same ones where tables 7 or 8 print them."""
    if place.task or len(values) == len(TASKS):
        return []
    words = f"over {', '.join(TASKS[task] for task in values)} only"
    row = printed_places(7 if place.quantity == "speed" else 8)
    printed = {one.task: float(one.paper) for one in row if one.method == place.method and one.task}
    if place.paper and printed and not place.over_full:
        words += f", the paper's mean over these is {statistics.fmean(printed[task] for task in values):.2f}"
    return [Reason("partial_average", words)]


def _against(place: Place, measured: EfficiencyEvidence) -> list[Reason]:
    """Why a cell may not be compared with the print: there is always a reason."""
    reasons = [] if place.paper else [Reason("not_printed", "the paper prints no value")]
    if measured.model != PAPER_MODEL:
        reasons.append(Reason("other_model", f"{measured.model} is not the paper's {PAPER_MODEL}"))
    if place.quantity == "average":
        return reasons
    record = next(iter(measured.tasks.values())).facts
    reasons += of_scale([record["run"]["scale"]])
    device, batch = record["device"]["name"], record["treatment"]["batch_size"]
    reasons.append(Reason("machine", f"{device}, batch {batch}: the paper names neither"))
    if place.paper and place.quantity == "speed":
        reasons.append(Reason("counting", "how the printed steps were counted is unknown (D22)"))
    if place.paper and place.quantity == "evaluation":
        reasons.append(Reason("evaluation", "the printed peak is taken to be an evaluation's (D21)"))
    return reasons


def _why_not(place: Place, measured: EfficiencyEvidence) -> list[Reason]:
    if not measured.model:
        return [Reason("no_model", "nothing was measured in RoBERTa-base's place")]
    if place.quantity == "average":
        return [Reason("no_run", f"no finished training run of {place.method} on {measured.model}")]
    records = [record for task, record in measured.tasks.items() if place.task in ("", task)]
    skipped = dict.fromkeys(record.missing[place.method] for record in records if place.method in record.missing)
    if skipped:
        return [Reason("skipped", f"{place.method} of {measured.model}: {'; '.join(skipped)}")]
    where = f"{measured.model}{f' on {place.column}' if place.task else ''}"
    words = f"{place.method} of {where} was not measured" if records else f"no record of {where}"
    return [Reason("no_record", words)]


def _machine(measured: EfficiencyEvidence, labels: Labels) -> list[Note]:
    """Device and treatment, once where all tasks agree, else by task; padding, lengths, what disturbed the clock."""
    lines: dict[str, list[str]] = {}
    for task, record in measured.tasks.items():
        device, how = record.facts["device"], record.facts["treatment"]
        text = (
            f"Measured on {device['name']} ({device['type']}, {device['threads']} threads), {how['precision']}, batch "
            f"{how['batch_size']}, padding {how['padding']} (at most {how['max_length']} tokens), {how['optimizer']}, "
            f"train={how['train']}; {how['kept']}, {how['rounds']} rounds of {how['batches']} batches, "
            f"{how['warmup_steps']} warm-up steps."
        )
        lines.setdefault(text, []).append(labels.task(task))
    found = [text if len(lines) == 1 else f"{', '.join(tasks)}: {text}" for text, tasks in lines.items()]
    facts = {labels.task(task): record.facts for task, record in measured.tasks.items()}
    if shares := [f"{name} {100 * one['lengths']['padded_share']:.0f} %" for name, one in facts.items()]:
        found.append(f"Share of padded tokens: {', '.join(shares)}.")
        found.append(f"Token lengths: {'; '.join(dict.fromkeys(one['lengths']['source'] for one in facts.values()))}.")
    warnings = dict.fromkeys(text for one in facts.values() for text in one.get("warnings", ()))
    return [*(Note("machine", text) for text in found), *(Note("warning", f"{text}.") for text in warnings)]


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


def _missing(measured: EfficiencyEvidence, labels: Labels) -> list[Note]:
    """Name the variants that were not measured, and why, and the records that were left out."""
    reasons: dict[str, list[str]] = {}
    for task, record in measured.tasks.items():
        for name, reason in record.missing.items():
            reasons.setdefault(f"{name}: {reason}", []).append(labels.task(task))
    found = [f"Not measured, {reason} ({', '.join(tasks)})." for reason, tasks in reasons.items()]
    found += [f"Records left out: {', '.join(measured.left_out)}."] if measured.left_out else []
    return [Note("loss", text) for text in found]
