"""Training steps mode by mode, of which the paper has no table: `table_steps` of encoders, `table_decoders`.

A row is a variant in one setting. Times over full fine-tuning's are of the same record: the same mode, batches and
minutes.
"""

from collections.abc import Iterator, Sequence

from finetune.report.evidence.experiment import Experiment
from finetune.report.evidence.step_evidence import BEFORE, EAGER, GRAPHS, MODES, Setting, Step
from finetune.report.labels import Labels
from finetune.report.model import Cell, Note, Reason, Table
from finetune.report.paper.layouts import printed_places
from finetune.report.tables.places import OWN_LABELS
from finetune.stats import verdicts

_TITLES = {
    "table_steps": "Time and memory of a training step",
    "table_decoders": "Time and memory of a decoder's training step",
}
_NOTES = (
    "A time is the median over all timed steps, a peak that of one step of the longest batch; '/ full' is over full "
    "fine-tuning's of the same record, and below 1 is faster or leaner.",
    "Weights are random: time and memory do not depend on their values.",
)


def build_step_tables(settings: Sequence[Setting], experiment: Experiment) -> list[Table]:
    """Build the tables that there is something for: settings in several modes, and decoders.

    An encoder that was only measured eagerly is in tables 3, 7 and 8 already.
    """
    both = [one for one in settings if not one.decoder]
    found = {
        "table_steps": both if any(one.modes() != [EAGER] for one in both) else [],
        "table_decoders": [one for one in settings if one.decoder],
    }
    return [_table(name, settings, experiment) for name, settings in found.items() if settings]


def variant_labels(settings: Sequence[Setting], labels: Labels) -> dict[str, str]:
    """Variant -> its label in tables, in the order of the records."""
    printed = {one.method: one.row for one in printed_places(7)} | OWN_LABELS
    names = dict.fromkeys(name for one in settings for steps in one.steps.values() for name in steps)
    return {name: printed.get(name, labels.method(name)) for name in names}


def _table(name: str, settings: Sequence[Setting], experiment: Experiment) -> Table:
    called = variant_labels(settings, experiment.labels)
    modes = [mode for mode in MODES if any(mode in one.steps for one in settings)]
    cells = [
        cell
        for setting in settings
        for variant, label in called.items()
        for cell in _row(setting, variant, f"{setting.name(experiment.labels)}: {label}", modes)
    ]
    titles = dict.fromkeys(one.title for one in settings)
    return Table(
        number=None,
        name=name,
        title=_TITLES[name],
        experiment=experiment.name,
        protocol="",
        cells=tuple(cells),
        models=(f"Measured: {', '.join(titles)}.",),
        notes=(*(Note("rule", text) for text in _NOTES), *_facts(settings, experiment.labels)),
    )


def _row(setting: Setting, variant: str, row: str, modes: Sequence[str]) -> Iterator[Cell]:
    for mode in modes:
        step = setting.step(mode, variant)
        if step is None:
            continue
        values = {
            ("milliseconds", "ms"): 1000 * step.seconds,
            ("ratio", "ms / full"): step.over_full,
            ("gigabytes", "GB"): step.peak / 1e9,
            ("ratio", "GB / full"): step.peak_over_full,
        }
        for (quantity, unit), value in values.items():
            if value is not None:
                yield _cell(setting, variant, row, f"{MODES[mode]}: {unit}", quantity, value, (step,))
    eager, graphs = setting.step(EAGER, variant), setting.step(GRAPHS, variant)
    if eager is not None and graphs is not None:
        faster = eager.seconds / graphs.seconds
        yield _cell(setting, variant, row, "eager / graphs", "ratio", faster, (eager, graphs))


def _cell(
    setting: Setting, variant: str, row: str, column: str, quantity: str, value: float, steps: tuple[Step, ...]
) -> Cell:
    return Cell(
        row=row,
        column=column,
        quantity=quantity,
        method=variant,
        task=setting.task,
        value=value,
        verdict=verdicts.NOT_COMPARABLE,
        reasons=(Reason("not_printed", "the paper prints no value"),),
        model=setting.model,
        records=tuple(step.path for step in steps),
    )


def _facts(settings: Sequence[Setting], labels: Labels) -> Iterator[Note]:
    """Device, and what was before, once; then sizes; then what was not measured, and what disturbed the clock."""
    records = [record for one in settings for found in one.facts.values() for record in found]
    devices = dict.fromkeys(record["device"]["name"] for record in records)
    yield Note("machine", f"Measured on {', '.join(devices)}.")
    notes = dict.fromkeys(record.get("note", "") for one in settings for record in one.facts.get(BEFORE, ()))
    yield from (Note("machine", f"Before: {text}") for text in notes if text)
    for one in settings:
        size = f"{one.rows} rows of {one.tokens:.0f} tokens, the mean over batches, padding with them"
        yield Note("machine", f"{one.name(labels)}: {size}.")
    missing: dict[str, list[str]] = {}
    for one, mode, record in ((o, m, r) for o in settings for m in o.modes() for r in o.facts[m]):
        for entry in record["variants"]:
            if entry["status"] != "finished":
                place = f"{one.name(labels)}, {MODES[mode]}"
                missing.setdefault(f"{entry['name']}: {entry['reason']}", []).append(place)
    yield from (Note("loss", f"Not measured, {why} ({'; '.join(where)}).") for why, where in missing.items())
    texts = dict.fromkeys(text for record in records for text in record.get("warnings", ()))
    yield from (Note("warning", f"{text}.") for text in texts)
