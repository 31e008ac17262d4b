"""Figure `methods_scores`: paired differences of SparseGrad and its variants from the other methods, a forest plot.

First our runs, a panel for each model and family of comparisons, then the decoder's losses, then the authors' released
logs by the same code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.published import TASKS
from finetune.report.figures.figure_style import COLOURS, GREY, Words, new_figure, save_figure
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.report.statistics.markdown import label

NAME = "methods_scores"
FOCUS = "sparsegrad"
COLUMNS, LINE, PANEL = 2, 0.17, 3.6
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
    average: bool


def draw_scores(content: Mapping[str, Any], folder: str | Path, source: Sequence[str]) -> list[Path]:
    """Draw the figure from the record of the statistics.

    Args:
        content: As `build_statistics` gives it, or as read back from `statistics.json`.
        folder: Folder of the figures.
        source: Paths of what it is drawn from.

    Returns:
        Paths of the SVG, the PNG and the JSON.
    """
    groups = [
        [(*panel, POINTS) for entry in content["runs"] for panel in _panels(entry, f"{entry['title']}, our runs")]
    ]
    decoder = content["decoder"]
    if decoder is not None:
        pairs = {"comparison": {"families": [_as_scores(family) for family in decoder["families"]]}}
        groups.append([(*panel, NATS) for panel in _panels(pairs, f"{decoder['title']}, our runs")])
    logs = sorted(content["logs"], key=lambda entry: [*PAPER_MODELS].index(entry["model"]))
    groups.append([(*panel, POINTS) for entry in logs for panel in _panels(entry, f"{entry['title']}, authors' logs")])
    rows = [group[start : start + COLUMNS] for group in groups for start in range(0, len(group), COLUMNS)]
    heights = [max(len(lines) for _, lines, _ in row) for row in rows]
    size = (PANEL * COLUMNS, LINE * sum(heights) + 1.0 * len(rows))
    cut = False
    with new_figure(*size, len(rows), COLUMNS, height_ratios=heights) as (figure, axes):
        for found, row in zip(axes, rows, strict=True):
            for axis, panel in zip(found, row, strict=False):
                cut = _draw(axis, *panel) or cut
            for axis in found[len(row) :]:
                axis.set_axis_off()
        return save_figure(figure, folder, NAME, _words(content, source, cut))


def _panels(entry: Mapping[str, Any], title: str) -> list[tuple[str, list[Line]]]:
    """One panel for the four methods of a model, with tasks, and one for each other family, means over tasks only."""
    panels = []
    for family in entry["comparison"]["families"]:
        name, pairs = family["name"], family["pairs"]
        if name == "methods":
            lines = [line for pair in pairs if pair["first"] == FOCUS for line in _lines(pair)]
            panels.append((f"{title}\n{label(FOCUS)} minus ...", lines))
        elif name.startswith("methods, "):
            change = f"_{name.removeprefix('methods, ')}"
            names = [[label(pair[side].removesuffix(change)) for side in ("first", "second")] for pair in pairs]
            lines = [_average(pair, " − ".join(found)) for pair, found in zip(pairs, names, strict=True)]
            panels.append((f"{title}\nevery method as {change[1:]}", lines))
        else:
            base = label(name.removeprefix("variants of ").removeprefix("methods over "))
            panels.append((f"{title}\n... minus {base}", [_average(pair, label(pair["first"])) for pair in pairs]))
    return [(name, found) for name, found in panels if found]


def _as_scores(family: Mapping[str, Any]) -> dict[str, Any]:
    """A family of losses in the shape of one of scores over no tasks."""
    return {
        "name": family["name"],
        "pairs": [{**pair, "mean": {"difference": pair["difference"]}, "tasks": {}} for pair in family["pairs"]],
    }


def _average(pair: Mapping[str, Any], text: str) -> Line:
    return Line(text, pair["mean"]["difference"], _colour(pair), True)


def _lines(pair: Mapping[str, Any]) -> list[Line]:
    """One pair: the mean over tasks, then its tasks."""
    average = _average(pair, f"{label(pair['second'])}{', AVG' if pair['tasks'] else ''}")
    tasks = [Line(TASKS[task], test["difference"], average.colour, False) for task, test in pair["tasks"].items()]
    return [average, *tasks] if len(tasks) > 1 else [average]


def _colour(pair: Mapping[str, Any]) -> str:
    """Of the method that the second one is or varies, or of the first where the two are SparseGrad's forms."""
    second = pair["second"].partition("_")[0]
    return COLOURS.get(second if second != FOCUS else pair["first"].partition("_")[0], GREY)


def _draw(axis, title: str, lines: Sequence[Line], unit: str) -> bool:
    """Draw a panel from the top; say whether an interval was cut at the edge."""
    limit = _limit(lines)
    cut = False
    for place, line in enumerate(lines):
        value, low, high = (line.difference[key] for key in ("value", "low", "high"))
        if low is not None:
            axis.plot(
                [max(low, -limit), min(high, limit)],
                [place, place],
                color=line.colour,
                linewidth=2.2 if line.average else 1.1,
                solid_capstyle="butt",
            )
            for end, mark in ((low, "<"), (high, ">")):
                if abs(end) > limit:
                    edge = limit if end > 0 else -limit
                    axis.plot([edge], [place], mark, color=line.colour, markersize=4, clip_on=False)
                    cut = True
        axis.plot(
            [value], [place], "D" if line.average else "o", color=line.colour, markersize=5 if line.average else 3
        )
    axis.axvline(0, color=GREY, linewidth=1)
    axis.set_xlim(-limit, limit)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_yticks(range(len(lines)), [line.text for line in lines])
    for text, line in zip(axis.get_yticklabels(), lines, strict=True):
        text.set_fontweight("bold" if line.average else "normal")
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(unit)
    axis.set_title(title, loc="left")
    return cut


def _limit(lines: Sequence[Line]) -> float:
    """Half width of a panel: all values and all intervals of averages fit, longer ones of single tasks are cut."""
    ends = [abs(line.difference["value"]) for line in lines]
    ends += [abs(line.difference[key]) for line in lines if line.average for key in ("low", "high") if _has(line)]
    return 1.1 * max(ends) or 1.0


def _has(line: Line) -> bool:
    return line.difference["low"] is not None


def _words(content: Mapping[str, Any], source: Sequence[str], cut: bool) -> Words:
    titles = ", ".join(f"{entry['title']} ({entry['model']})" for entry in content["runs"]) or "nothing ran"
    seeds = sorted(
        {one["n"] for entry in content["runs"] for found in entry["comparison"]["methods"].values()
         for one in found["tasks"].values()}
    )  # fmt: skip
    spread = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "no"
    losses = " Validation losses are in nats a token: left of 0 the first method is lower, which is better."
    losses = losses if content["decoder"] is not None else ""
    return Words(
        title="Differences between methods at equal task and seed",
        caption=f"Experiment {content['experiment']}, protocol {content['protocol']}: {titles}, {spread} seeds a task; "
        "and the authors' released logs, through the same code. SparseGrad minus the other method, points of the "
        "task's score (accuracy, Matthews for CoLA, Pearson for STSB, all times 100), 95 % t intervals over paired "
        "seeds; AVG weighs tasks alike. Right of 0: the first method scores higher." + losses,
        notes=(
            *(["Arrows: the interval goes on beyond the panel."] if cut else []),
            "Panels have scales of their own.",
            "Intervals are not corrected for the number of comparisons; statistics.md has corrected tests.",
        ),
        source=tuple(source),
    )
