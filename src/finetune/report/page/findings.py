"""The findings at the top of the page: sentences whose every number is read from `statistics.json` or from a table.

No sentence is written by hand: each is a rule's, which says "not separated" where the test says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from finetune.report.figures.energy_evidence import TRAJECTORIES
from finetune.report.labels import Labels
from finetune.report.markdown import interval, p_value
from finetune.report.model import Table, format_value
from finetune.report.page.inputs import PageInputs
from finetune.report.page.scores import NATS, POINTS, Unit, ends, family_title, pair_name, said
from finetune.report.page.tables import heading_of, shown
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.report.paper.printed_averages import CONTRADICTED, CUT_OFF
from finetune.report.statistics.families import METHODS
from finetune.stats.verdicts import LEVEL, NOT_SEPARATED

FOCUS = "sparsegrad"
"""The method whose pairs are shown also where nothing separates them."""


class Finding(NamedTuple):
    """A card: the answer in a few words, sentences with numbers and intervals, and what limits it."""

    title: str
    lines: Sequence[str]
    after: str


def findings(inputs: PageInputs) -> Iterator[Finding]:
    """What the numbers say: our runs, then cost, then the paper's own numbers and logs."""
    content, labels = inputs.statistics or {}, inputs.labels
    tables = [table for table in inputs.tables.values() if table is not None]
    for entry in content.get("runs", ()):
        yield from _compared(entry, entry["comparison"]["families"], labels, POINTS)
    yield from _stale([one.content for one in inputs.of_kind("energy")])
    for table in tables:
        yield from _loss(table)
    for entry in content.get("decoders", ()):
        families = [family for family in entry["comparison"]["families"] if family["kind"] != METHODS]
        yield from _compared(entry, families, labels, NATS)
    for table in tables:
        yield from _speed(table)
    if content:
        yield from _logs(content["logs"], labels)
        yield _averages([one for one in content["averages"] if not one["repeats"]])
        yield from _exchange(content["exchange"], labels)


def pair_sentence(pair: Mapping[str, Any], labels: Labels, unit: Unit = POINTS) -> str:
    """Say what a paired test of two methods over all their tasks says: a pair of a family in `statistics.json`."""
    test = pair["mean"]
    few = ", so few pairs separate nothing" if (test["least"] or 0) > LEVEL else ""
    numbers = f"p {p_value(test['p_holm'])}, {test['pairs']} pairs{few}"
    difference = f"{interval(test['difference'], '+', unit.places)} {unit.name}"
    return f"{pair_name(pair, labels)}: {difference}, {said(test['verdict'], pair, labels)} ({numbers})."


def _compared(
    entry: Mapping[str, Any], families: Iterable[Mapping[str, Any]], labels: Labels, unit: Unit
) -> Iterator[Finding]:
    """Families of pairs; of all methods only those that are separated, and the focus'."""
    for family in (one for one in families if one["pairs"]):
        pairs = family["pairs"]
        apart = [pair for pair in pairs if pair["mean"]["verdict"] != NOT_SEPARATED]
        lines = [
            pair_sentence(pair, labels, unit)
            for pair in pairs
            if pair in apart or family["kind"] != METHODS or FOCUS in (pair["first"], pair["second"])
        ]
        if unit == POINTS:
            lines += [
                f"On {labels.task(task)} alone, {pair_name(pair, labels)}: {interval(test['difference'], '+')} points, "
                f"p {p_value(test['p_holm'])}."
                for pair in pairs
                for task, test in pair["tasks"].items()
                if test["verdict"] != NOT_SEPARATED
            ]
        separated = f"{len(apart)} of {len(pairs)} pairs separated" if apart else "no pair separated"
        title = family_title(family, labels)
        title = f"{title[:1].upper()}{title[1:]} on {entry['title']}: {separated}"
        yield Finding(title, lines, _limits(entry, pairs, labels, unit))


def _limits(entry: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], labels: Labels, unit: Unit) -> str:
    tasks = labels.in_order({task for pair in pairs for task in pair["tasks"]})
    seeds = ends(test["pairs"] for pair in pairs for test in pair["tasks"].values())
    paper = [PAPER_MODELS[name] for name in entry.get("stands_for", ()) if name != entry["model"]]
    place = f" {entry['title']} stands in the place of {', '.join(paper)}." if paper else ""
    what, test = f"Mean over {', '.join(map(labels.task, tasks))}, {seeds} paired seeds a task", "sign-flip test"
    if unit == NATS:
        what, test = f"Validation loss, lower is better, {seeds} paired seeds", "paired t test"
    return f"{what}, 95 % t intervals; {test}, p corrected for the family (Holm).{place}"


def _stale(energies: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """What a basis' leading block holds of the gradient's energy at the first and at the last look, by model."""
    for model in dict.fromkeys(record["titles"]["model"] for record in energies):
        lines, kept = [], []
        for record in (one for one in energies if one["titles"]["model"] == model):
            first, last = record["steps"][0], record["steps"][-1]
            start, end = _in_block(first, "initial"), _in_block(last, "initial")
            kept.append(end / start)
            name = TRAJECTORIES.get(record["run"]["trajectory"], record["run"]["trajectory"])
            lines.append(
                f"{record['titles']['task']}, {name}: {start:.2f} at step {first['step']}, {end:.2f} at step "
                f"{last['step']}, {_in_block(last, 'refreshed'):.2f} if renewed there; a basis made under another head "
                f"starts at {_in_block(first, 'stored'):.2f}."
            )
        keeps = ends(round(100 * share) for share in kept)
        yield Finding(
            f"How a basis ages on {model}: {keeps} % of its block’s energy is left at the last look",
            lines,
            f"Share of the gradient's energy in the leading block of the run's own basis, mean over {model}'s layers. "
            "One seed a trajectory.",
        )


def _in_block(step: Mapping[str, Any], space: str) -> float:
    return mean(layer["block"] for layer in step["spaces"][space])


def _loss(table: Table) -> Iterator[Finding]:
    """Validation loss of each decoder of a table, lowest first."""
    losses = [cell for cell in table.cells if cell.quantity == "loss" and cell.low is not None]
    trained = {
        (cell.row, cell.model): f", trains {format_value(cell.quantity, cell.value)}"
        for cell in table.cells
        if cell.quantity == "trained_share" and cell.value
    }
    for model in dict.fromkeys(cell.model for cell in losses):
        cells = sorted((cell for cell in losses if cell.model == model), key=lambda cell: cell.value)
        if len(cells) < 2:
            continue
        lines = [f"{cell.row}: {shown(cell)} nats a token{trained.get((cell.row, model), '')}." for cell in cells]
        apart = cells[0].high < cells[1].low
        best = f"{cells[0].row} has the lowest validation loss" if apart else "no lowest validation loss stands apart"
        seeds = ends(cell.n for cell in cells)
        after = f"mean over {seeds} seeds, 95 % t intervals; where two overlap, neither is said to be lower."
        yield Finding(f"Decoder: {best}", lines, f"{heading_of(table.name)}, {model}: {after}")


def _speed(table: Table) -> Iterator[Finding]:
    """Speed and peak memory in training over full fine-tuning's, averages over tasks."""
    ratios = [cell for cell in table.cells if "over_full" in cell.flags and not cell.task and cell.value is not None]
    speeds = sorted((cell for cell in ratios if cell.quantity == "speed"), key=lambda cell: -(cell.value or 0))
    peaks = {cell.method: f", peak in training × {cell.value:.2f}" for cell in ratios if cell.quantity == "training"}
    if not speeds or not peaks:  # tables 7 and 8 hold one of them, by task
        return
    names = {cell.method: cell.row for cell in reversed(table.cells) if "over_full" not in cell.flags}
    faster = [names[cell.method] for cell in speeds if (cell.low or 0) > 1]
    warnings = "".join(f" Warning: {note.text}" for note in table.notes if note.kind == "warning")
    yield Finding(
        f"Faster than full fine-tuning a step: {'; '.join(faster) or 'no method'}",
        [f"{names[cell.method]}: speed × {shown(cell)}{peaks.get(cell.method, '')}." for cell in speeds],
        f"{heading_of(table.name)}, {speeds[0].model}: ratios to full fine-tuning on the same batches of one machine, "
        f"95 % intervals.{warnings}",
    )


def _logs(logs: Sequence[Mapping[str, Any]], labels: Labels) -> Iterator[Finding]:
    """The authors' logs beside the printed averages, over the same tasks."""
    if not logs:
        return
    lines = []
    for entry in logs:
        parts = [
            f"{labels.method(method)} {row['logs']['mean']:.2f} (printed {row['printed_same_tasks']:.2f})"
            for method, row in entry["printed"].items()
        ]
        over = ends(len(row["tasks"]) for row in entry["printed"].values())
        lines.append(f"{entry['title']}, {over} tasks: {', '.join(parts)}.")
    pairs = [pair for entry in logs for family in entry["comparison"]["families"] for pair in family["pairs"]]
    apart = sum(pair["mean"]["verdict"] != NOT_SEPARATED for pair in pairs)
    after = "Mean of the tasks’ means over the logged seeds; printed: the mean of the printed cells of the same tasks."
    yield Finding(f"The authors’ logs separate {apart or 'no'} of {len(pairs)} pairs of methods", lines, after)


def _averages(averages: Sequence[Mapping[str, Any]]) -> Finding:
    wrong = [one for one in averages if one["verdict"] == CONTRADICTED]
    cut = [f"Table {one['table']}, {one['row']}" for one in averages if one["verdict"] == CUT_OFF]
    lines = [f"Table {one['table']}, {one['row']}: printed {one['printed']}, {_instead(one)}." for one in wrong]
    lines += [f"Explained by digits cut off, not rounded: {'; '.join(cut)}."] if cut else []
    title = f"{len(wrong)} of {len(averages)} printed averages do not follow from their rows"
    return Finding(title, lines, "Beyond what rounding of cells and average, or cutting off, can explain.")


def _instead(one: Mapping[str, Any]) -> str:
    """What the row of a printed average gives."""
    if one["mean"] is not None:
        return f"its cells give {one['mean']:.2f}"
    low, high = one["implied"]
    other = f"; {one['twin']}, the same row, prints {one['twin_value']}" if one["twin"] else ""
    return f"so {', '.join(one['missing'])}, not printed here, would be {low:.1f} to {high:.1f}{other}"


def _exchange(exchange: Mapping[str, Any], labels: Labels) -> Iterator[Finding]:
    """Whether the cells that were asked about look exchanged between two methods."""
    asked = exchange["asked"]
    cells = [one for one in exchange["cells"] if one["model"] == asked["model"] and one["task"] in asked["tasks"]]
    lines = []
    for one in cells:
        printed, logged = (", ".join(f"{value:.1f}" for value in one[key]) for key in ("printed", "logged"))
        lines.append(
            f"{labels.task(one['task'])}: printed {printed}; logs {logged}. Distance {one['distance']:.2f} as printed, "
            f"{one['distance_exchanged']:.2f} exchanged; p by chance {p_value(one['p_chance'])}, "
            f"{p_value(one['p_holm'])} corrected."
        )
    if lines:
        methods = " and ".join(map(labels.method, asked["methods"]))
        answers = "; ".join(f"{labels.task(one['task'])} {one['verdict']}" for one in cells)
        title = f"Are {PAPER_MODELS[asked['model']]}’s cells of {methods} exchanged? {answers}"
        yield Finding(title, lines, f"Pairs of numbers: {methods}.")
