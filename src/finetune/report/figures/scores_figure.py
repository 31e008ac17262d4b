"""Figure `methods_scores`: paired differences between methods and their variants, a forest plot.

First our runs, a panel for each model and family of comparisons, then the decoder's losses, then the authors' released
logs by the same code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.report.figures.figure_style import GREY, Words, new_figure, save_figure, styles
from finetune.report.labels import Labels

NAME = "methods_scores"
MAIN = "methods"
"""Name of the family of all methods, whose pairs show their tasks."""

FOCUS = "sparsegrad"
COLUMNS, LINE, PANEL = 2, 0.17, 4.6
"""Panels side by side; height of a line and width of a panel, inches."""

POINTS, NATS = "difference (points)", "difference of losses (nats)"


@dataclass(frozen=True)
class Line:
    """One difference of a panel.

    Attributes:
        text: Its label.
        difference: `value`, `low` and `high` in the panel's unit; ends `None` without an interval.
        colour: Of the method compared with.
        average: Whether it is over all tasks.
    """

    text: str
    difference: Mapping[str, float | None]
    colour: str
    average: bool = True


@dataclass(frozen=True)
class Panel:
    """The differences of one family, in one unit."""

    title: str
    lines: Sequence[Line]
    unit: str


def draw_scores(content: Mapping[str, Any], folder: str | Path, source: Sequence[str], labels: Labels) -> list[Path]:
    """Draw the figure from the record of the statistics.

    Args:
        content: As `build_statistics` gives it, or as read back from `statistics.json`.
        folder: Folder of the figures.
        source: Paths of what it is drawn from.
        labels: Of methods and tasks.

    Returns:
        Paths of the SVG, the PNG and the JSON.
    """
    groups = panels(content, labels)
    rows = [group[start : start + COLUMNS] for group in groups for start in range(0, len(group), COLUMNS)]
    heights = [max(len(panel.lines) for panel in row) for row in rows]
    cut = False
    size = (PANEL * COLUMNS, LINE * sum(heights) + 1.0 * len(rows))
    with new_figure(*size, len(rows), COLUMNS, height_ratios=heights) as (figure, axes):
        for found, row in zip(axes, rows, strict=True):
            for axis, panel in zip(found, row, strict=False):
                cut = _draw(axis, panel) or cut
            for axis in found[len(row) :]:
                axis.set_axis_off()
        return save_figure(figure, folder, NAME, _words(content, source, cut))


def panels(content: Mapping[str, Any], labels: Labels) -> list[list[Panel]]:
    """The panels of our runs, of the decoders and of the authors' logs; a group starts a line of its own."""
    return [
        [panel for entry in content["runs"] for panel in _of(entry, "our runs", POINTS, labels)],
        [panel for entry in content["decoders"] for panel in _of(entry, "our runs", NATS, labels)],
        [panel for entry in content["logs"] for panel in _of(entry, "authors' logs", POINTS, labels)],
    ]


def _of(entry: Mapping[str, Any], whose: str, unit: str, labels: Labels) -> list[Panel]:
    """A panel a family: the methods against one of them, with tasks; all others by their means over tasks alone."""
    families = [family for family in entry["comparison"]["families"] if family["pairs"]]
    found = []
    for family in families:
        pairs, colours = family["pairs"], [_colour(pair, labels) for pair in family["pairs"]]
        firsts, seconds = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in ("first", "second"))
        if family["name"] == MAIN:
            first = FOCUS if FOCUS in firsts else firsts[0]
            what = f"{labels.method(first)} minus ..."
            own = [(pair, colour) for pair, colour in zip(pairs, colours, strict=True) if pair["first"] == first]
            lines = [line for pair, colour in own for line in _lines(pair, colour, labels)]
        else:
            alone = len(seconds) == 1
            what = f"... minus {labels.method(seconds[0])}" if alone else family["name"]
            texts = [
                " − ".join(map(labels.method, (pair["first"], *([] if alone else [pair["second"]])))) for pair in pairs
            ]
            lines = [_average(*one) for one in zip(pairs, texts, colours, strict=True)]
        found.append(Panel(f"{entry['title']}, {whose}\n{what}", lines, unit))
    return found


def _average(pair: Mapping[str, Any], text: str, colour: str) -> Line:
    """A pair over all its tasks."""
    return Line(text, pair["mean"]["difference"], colour)


def _lines(pair: Mapping[str, Any], colour: str, labels: Labels) -> list[Line]:
    """One pair: the mean over tasks, then its tasks."""
    tasks = pair["tasks"]
    average = _average(pair, f"{labels.method(pair['second'])}{', AVG' if len(tasks) > 1 else ''}", colour)
    order = labels.in_order(set(tasks))
    single = [Line(labels.task(task), tasks[task]["difference"], colour, False) for task in order]
    return [average, *single] if len(single) > 1 else [average]


def _colour(pair: Mapping[str, Any], labels: Labels) -> str:
    """Of the method that the second one is or varies, or of the first where the second is SparseGrad."""
    name = pair["second"] if pair["second"] != FOCUS else pair["first"]
    return styles([name], labels.kin)[name][0]


def _draw(axis, panel: Panel) -> bool:
    """Draw a panel from the top; say whether an interval was cut at the edge."""
    lines, limit = panel.lines, _limit(panel.lines)
    cut = False
    for place, line in enumerate(lines):
        value, low, high = (line.difference[key] for key in ("value", "low", "high"))
        width, mark, size = (2.2, "D", 5) if line.average else (1.1, "o", 3)
        if low is not None:
            ends = [max(low, -limit), min(high, limit)]
            axis.plot(ends, [place, place], color=line.colour, linewidth=width, solid_capstyle="butt")
            for end, arrow in ((low, "<"), (high, ">")):
                if abs(end) > limit:
                    edge = limit if end > 0 else -limit
                    axis.plot([edge], [place], arrow, color=line.colour, markersize=4, clip_on=False)
                    cut = True
        axis.plot([value], [place], mark, color=line.colour, markersize=size)
    axis.axvline(0, color=GREY, linewidth=1)
    axis.set(xlim=(-limit, limit), ylim=(len(lines) - 0.4, -0.6), xlabel=panel.unit)
    axis.set_yticks(range(len(lines)), [line.text for line in lines])
    if not all(line.average for line in lines):  # bold, so that they stand out of the tasks
        for text, line in zip(axis.get_yticklabels(), lines, strict=True):
            text.set_fontweight("bold" if line.average else "normal")
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set_title(panel.title, loc="left")
    return cut


def _limit(lines: Sequence[Line]) -> float:
    """Half width of a panel: all values and all intervals of averages fit, longer ones of single tasks are cut."""
    ends = [line.difference["value"] for line in lines]
    ends += [line.difference[key] for line in lines if line.average for key in ("low", "high")]
    return 1.1 * max(abs(end) for end in ends if end is not None) or 1.0


def _words(content: Mapping[str, Any], source: Sequence[str], cut: bool) -> Words:
    titles = ", ".join(f"{entry['title']} ({entry['model']})" for entry in content["runs"]) or "nothing ran"
    methods = [found for entry in content["runs"] for found in entry["comparison"]["methods"].values()]
    seeds = sorted({one["n"] for found in methods for one in found["tasks"].values()})
    spread = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "no"
    losses = " Validation losses are in nats a token: left of 0 the first method is lower, which is better."
    return Words(
        title="Differences between methods at equal task and seed",
        caption=f"Experiment {content['experiment']}, protocol {content['protocol']}: {titles}, {spread} seeds a task; "
        "and the authors' released logs, through the same code. The first method minus the second, points of the "
        "task's score (accuracy, Matthews for CoLA, Pearson for STSB, all times 100), 95 % t intervals over paired "
        "seeds; AVG weighs tasks alike. Right of 0: the first method scores higher."
        + (losses if content["decoders"] else ""),
        notes=(
            *(["Arrows: the interval goes on beyond the panel."] if cut else []),
            "Panels have scales of their own.",
            "Intervals are not corrected for the number of comparisons; statistics.md has corrected tests.",
        ),
        source=tuple(source),
    )
