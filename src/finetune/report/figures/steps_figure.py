"""Time and memory of a training step before and after, as one picture: `figure_steps`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune.report.evidence.step_evidence import BEFORE, EAGER, GRAPHS, MODES, Setting
from finetune.report.figures.figure_style import (
    GREY,
    Mark,
    Words,
    new_figure,
    number,
    relative_paths,
    rows_of_dots,
    save_figure,
)
from finetune.report.figures.figures_efficiency import looks_of
from finetune.report.labels import Labels

_MARKS = {EAGER: ("o", True), GRAPHS: ("D", True), BEFORE: ("o", False)}
"""Mode -> its marker, and whether it is filled."""

_ORDER = (BEFORE, EAGER, GRAPHS)
_PANELS = (("time of a step, ms", "seconds", 1e3), ("peak memory in training, GB", "peak", 1e-9))
_LINE, _FRAME = 0.27, 0.75  # inches


def draw_figure_steps(settings: Sequence[Setting], folder: Path, labels: Labels) -> list[Path]:
    """Milliseconds and peak memory of all variants, before and now, eager and in graphs: `figure_steps.*`.

    Shown are the settings that were measured before; of decoders the largest without checkpointing.

    Raises:
        ValueError: If there is none.
    """
    shown = _shown(settings)
    if not shown:
        raise ValueError("there is no record of before: the figure is drawn for an experiment with a folder `before`.")
    looks = looks_of((name for one in shown for steps in one.steps.values() for name in steps), labels)
    rows = [[name for name in looks if any(one.step(mode, name) for mode in MODES)] for one in shown]
    heights = [_FRAME + _LINE * len(names) for names in rows]
    grid = {"gridspec_kw": {"height_ratios": heights}}
    with new_figure(10, sum(heights) + 0.3, len(shown), len(_PANELS), **grid) as (figure, axes):
        figure.get_layout_engine().set(w_pad=0.15)  # the values beside the last panel
        for setting, names, line in zip(shown, rows, axes, strict=True):
            for axis, (label, field, unit) in zip(line, _PANELS, strict=True):
                rows_of_dots(axis, [looks[name].label for name in names] if axis is line[0] else [""] * len(names))
                for place, name in enumerate(names):
                    _marks(axis, place, looks[name], _values(setting, name, field, unit))
                axis.set_xlim(left=0)
                axis.set_title(f"{setting.title}, {setting.name(labels)}: {label}", fontsize=8.5)
        modes = [mode for mode in _ORDER if any(mode in one.steps for one in shown)]
        figure.legend(handles=[_handle(mode) for mode in modes], loc="outside lower center", ncols=len(modes))
        return save_figure(figure, folder, "figure_steps", _words(shown, modes, labels))


def _shown(settings: Iterable[Setting]) -> list[Setting]:
    there = [one for one in settings if BEFORE in one.steps and not one.checkpointing]
    most = max((one.rows for one in there if one.decoder), default=0)
    return [one for one in there if not one.decoder or one.rows == most]


def _values(setting: Setting, name: str, field: str, unit: float) -> dict[str, float]:
    steps = {mode: setting.step(mode, name) for mode in _ORDER}
    return {mode: unit * getattr(step, field) for mode, step in steps.items() if step is not None}


def _marks(axis: Any, place: int, look: Mark, values: dict[str, float]) -> None:
    """A mark a mode, a line between them, and the values beside the panel, where no mark can lie."""
    axis.plot([min(values.values()), max(values.values())], [place, place], color=look.color, alpha=0.4, linewidth=1.2)
    for mode, value in values.items():
        marker, filled = _MARKS[mode]
        axis.plot(
            value,
            place,
            marker,
            mec=look.color,
            mfc=look.color if filled else "none",
            ms=5.5 if filled else 7.5,
            clip_on=False,
        )
    words = " → ".join(number(value) for value in values.values())
    axis.annotate(words, (1, place), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=7.5)


def _handle(mode: str) -> Any:
    from matplotlib.lines import Line2D

    marker, filled = _MARKS[mode]
    face = GREY if filled else "none"
    return Line2D([], [], color="none", mec=GREY, mfc=face, marker=marker, label=MODES[mode])


def _words(shown: Sequence[Setting], modes: Sequence[str], labels: Labels) -> Words:
    records = [record for one in shown for found in one.facts.values() for record in found]
    before = [record for one in shown for record in one.facts[BEFORE]]
    devices = ", ".join(dict.fromkeys(record["device"]["name"] for record in records))
    sizes = "; ".join(f"{one.name(labels)}: {one.rows} rows of {one.tokens:.0f} tokens" for one in shown)
    warnings = dict.fromkeys(text for record in records for text in record.get("warnings", ()))
    return Words(
        title="Time and memory of a training step, before and after",
        caption=(
            f"{devices}; {sizes}, the mean over batches, padding with them. "
            f"Marks: {', '.join(MODES[mode] for mode in modes)}; "
            "beside each panel their values in this order. Time is the median over all timed steps, memory the peak of "
            "one step of the longest batch. Weights are random."
        ),
        notes=(
            *dict.fromkeys(f"Before: {record['note']}" for record in before if "note" in record),
            *(f"Nothing measured now: {one.name(labels)}." for one in shown if one.modes() == [BEFORE]),
            *(f"Warning: {text}." for text in warnings),
        ),
        source=relative_paths([step.path for one in shown for steps in one.steps.values() for step in steps.values()]),
    )
