"""Figure `methods_scores`: paired differences between methods and their variants, a forest plot.

First our runs, a panel for each model and family of comparisons, then the decoder's losses, then the authors' released
logs by the same code.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.report.figures.figure_style import GREY, Words, new_figure, rows_of_dots, save_figure, styles
from finetune.report.labels import Labels

NAME = "methods_scores"
MAIN = "methods"
"""Name of the family of all methods, whose pairs show their tasks."""

FOCUS = "sparsegrad"
COLUMNS, LINE, PANEL = 2, 0.17, 4.6
"""Panels side by side; height of a line and width of a panel, inches."""

POINTS, NATS = "difference (points)", "difference of losses (nats)"


class Line(NamedTuple):
    """A difference: its label, `value`, `low` and `high` (None without an interval), colour, and if over all tasks."""

    text: str
    difference: Mapping[str, float | None]
    colour: str
    average: bool = True


class Panel(NamedTuple):
    """The differences of one family, in one unit."""

    title: str
    lines: Sequence[Line]
    unit: str


def draw_scores(content: Mapping[str, Any], folder: str | Path, source: Sequence[str], labels: Labels) -> list[Path]:
    """Draw the figure from `statistics.json`, of which `source` names the path; its three files."""
    groups = panels(content, labels)
    rows = [group[start : start + COLUMNS] for group in groups for start in range(0, len(group), COLUMNS)]
    heights = [max(len(panel.lines) for panel in row) for row in rows]
    size = (PANEL * COLUMNS, LINE * sum(heights) + 1.0 * len(rows))
    with new_figure(*size, len(rows), COLUMNS, height_ratios=heights) as (figure, axes):
        cut = [
            _draw(axis, panel)
            for found, row in zip(axes, rows, strict=True)
            for axis, panel in itertools.zip_longest(found, row)
        ]
        return save_figure(figure, folder, NAME, _words(content, source, any(cut)))


def panels(content: Mapping[str, Any], labels: Labels) -> list[list[Panel]]:
    """The panels of our runs, of the decoders and of the authors' logs; a group starts a line of its own."""
    groups = (("runs", "our runs", POINTS), ("decoders", "our runs", NATS), ("logs", "authors' logs", POINTS))
    return [
        [panel for entry in content[group] for panel in _of(entry, whose, unit, labels)]
        for group, whose, unit in groups
    ]


def _of(entry: Mapping[str, Any], whose: str, unit: str, labels: Labels) -> list[Panel]:
    """A panel a family: the methods against one of them, with tasks; all others by their means over tasks alone."""
    found = []
    for family in (one for one in entry["comparison"]["families"] if one["pairs"]):
        pairs = family["pairs"]
        firsts, seconds = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in ("first", "second"))
        if family["name"] == MAIN:
            first = FOCUS if FOCUS in firsts else firsts[0]
            what = f"{labels.method(first)} minus ..."
            lines = [line for pair in pairs if pair["first"] == first for line in _lines(pair, labels)]
        else:
            sides = ("first",) if len(seconds) == 1 else ("first", "second")
            what = f"... minus {labels.method(seconds[0])}" if len(seconds) == 1 else family["name"]
            texts = [" − ".join(labels.method(pair[side]) for side in sides) for pair in pairs]
            lines = [
                Line(text, pair["mean"]["difference"], _colour(pair, labels))
                for text, pair in zip(texts, pairs, strict=True)
            ]
        found.append(Panel(f"{entry['title']}, {whose}\n{what}", lines, unit))
    return found


def _lines(pair: Mapping[str, Any], labels: Labels) -> list[Line]:
    """One pair: the mean over tasks, then its tasks where there are several."""
    tasks, colour, name = pair["tasks"], _colour(pair, labels), labels.method(pair["second"])
    if len(tasks) < 2:
        return [Line(name, pair["mean"]["difference"], colour)]
    single = [Line(labels.task(one), tasks[one]["difference"], colour, False) for one in labels.in_order({*tasks})]
    return [Line(f"{name}, AVG", pair["mean"]["difference"], colour), *single]


def _colour(pair: Mapping[str, Any], labels: Labels) -> str:
    """Of the method that the second one is or varies, or of the first where the second is SparseGrad."""
    name = pair["second"] if pair["second"] != FOCUS else pair["first"]
    return styles([name], labels.kin)[name][0]


def _draw(axis: Any, panel: Panel | None) -> bool:
    """Draw a panel from the top, or nothing; say whether an interval was cut at the edge."""
    if panel is None:
        axis.set_axis_off()
        return False
    lines, limit, cut = panel.lines, _limit(panel.lines), False
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
    axis.set(xlim=(-limit, limit), xlabel=panel.unit)
    rows_of_dots(axis, [line.text for line in lines])
    if not all(line.average for line in lines):  # bold, so that they stand out of the tasks
        for text, line in zip(axis.get_yticklabels(), lines, strict=True):
            text.set_fontweight("bold" if line.average else "normal")
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
    spread = " to ".join(map(str, dict.fromkeys((*seeds[:1], *seeds[-1:])))) or "no"
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
