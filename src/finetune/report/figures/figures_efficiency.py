"""Speed and memory as pictures: all variants over full fine-tuning; a step's cost as k, tokens and width grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.report.evidence.efficiency_evidence import EfficiencyEvidence, Measured
from finetune.report.evidence.run import read_key
from finetune.report.figures.figure_style import (
    GREY,
    Mark,
    Words,
    band,
    legend_below,
    new_figure,
    number,
    relative_paths,
    save_figure,
    styles,
)
from finetune.report.labels import Labels
from finetune.report.paper.layouts import printed_places
from finetune.stats import intervals as stats

_FORMS = {
    "full": ("full fine-tuning", "full"),
    "lora": ("LoRA (peft)", "lora"),
    "meprop": ("MeProp", "meprop"),
    "rotated_regular": ("SparseGrad, the paper's layer", "rotated"),
    "rotated_sparse_by_dense": ("the same, sparse by dense", "rotated"),
    "folded": ("SparseGrad, folded", "sparsegrad"),
    "folded_backward": ("the same, layer by layer", "sparsegrad"),
    **{f"folded_{name}": (f"the same, rotated in {name}", "sparsegrad") for name in ("float32", "tf32", "bf16")},
    "truncated": ("SparseGrad, truncated", "truncated"),
    "truncated_input": ("SparseGrad, truncated (inputs)", "truncated"),
    "floor": ("frozen layer: the floor", ""),
}
"""Variant -> its name in figures, and what it has its colour from; others follow, by the labels of their methods."""

_DASHES = {"floor": "--", "truncated_input": "-."}
_CLOCKS = {"wall": "time by the clock", "cpu": "time that the process ran, whatever others took"}
_PANELS = {
    "k": ("entries kept, k", "k"),
    "tokens": ("tokens in the step", "tokens"),
    "width": ("width of the model, hidden size", "hidden"),
}


def looks_of(names: Iterable[str], labels: Labels) -> dict[str, Mark]:
    """How each variant is drawn, in the order of figures."""
    known = list(_FORMS)
    found = sorted(set(names), key=lambda name: (known.index(name) if name in _FORMS else len(known), name))
    kin = labels.kin | {name: of for name, (_, of) in _FORMS.items()}
    looks = {}
    for name, (colour, marker) in styles(found, kin).items():
        label = _FORMS[name][0] if name in _FORMS else labels.method(name)
        looks[name] = Mark(label, GREY if name == "floor" else colour, marker)
    return looks


def draw_figure_efficiency(evidence: EfficiencyEvidence, folder: Path, labels: Labels, *, seed: int = 0) -> list[Path]:
    """Steps per second and peak training memory of every variant, over full fine-tuning's: ``figure_efficiency.*``.

    The seed is the bootstrap's, behind the intervals of speed.

    Raises:
        ValueError: if no task has a record with full fine-tuning in it.
    """
    tasks = {task: record.variants for task, record in evidence.tasks.items() if "full" in record.variants}
    if not tasks:
        raise ValueError(f"no finished record of full fine-tuning in {evidence.experiment}: run the efficiency stage.")
    looks = looks_of((name for found in tasks.values() for name in found), labels)
    printed = _printed_speed()
    with new_figure(9, 0.42 * len(looks) + 1.3, 1, 2, sharey=True) as (figure, [[left, right]]):
        for place, (name, look) in enumerate(looks.items()):
            speed = {task: found[name].ratios for task, found in tasks.items() if name in found}
            memory = [_memory(found, name) for found in tasks.values() if name in found]
            mean = stats.bootstrap([*speed.values()], seed=seed)
            interval = None if name == "full" or mean.low is None else (mean.low, mean.high)
            _dots(left, place, look, [float(np.mean(rounds)) for rounds in speed.values()], mean.mean, interval)
            _dots(right, place, look, memory, float(np.mean(memory)), None)
            if name in printed and name != "full":
                label = None if left.get_legend_handles_labels()[1] else "printed in the paper (RoBERTa-base)"
                left.plot(printed[name], place + 0.3, "d", mfc="none", mec=GREY, ms=5, label=label)
        left.set_xlabel("steps per second (full fine-tuning = 1)\nright is faster")
        right.set_xlabel("peak memory in training (full fine-tuning = 1)\nleft is leaner")
        left.set_yticks(range(len(looks)), [look.label for look in looks.values()])
        left.invert_yaxis()
        for axis in (left, right):
            axis.locator_params(axis="x", nbins=6)
            axis.axvline(1, color=GREY, linewidth=1)
            axis.grid(False, axis="y")
        left.set_xlim(left=0)
        if left.get_legend_handles_labels()[1]:
            figure.legend(loc="outside lower left")
        return save_figure(figure, folder, "figure_efficiency", _words_efficiency(evidence, tasks, looks, labels))


def draw_figure_cost_curves(record: Mapping[str, Any], path: str, folder: Path, labels: Labels) -> list[Path]:
    """Milliseconds of one MLP's training step over k, tokens and width, logarithmic: ``figure_cost_curves.*``.

    The record is that of :func:`finetune.efficiency.cost_curves.cost_curves`.

    Raises:
        ValueError: if the record is of another kind or incomplete.
    """
    if read_key(path, record, "run", "kind") != "cost_curves":
        raise ValueError(f"{path} is a record of {record['run']['kind']!r}, no cost curves.")
    curves, points = read_key(path, record, "curves"), read_key(path, record, "points")
    looks = looks_of(points[record["base"]]["variants"], labels)
    with new_figure(10, 4.2, 1, len(_PANELS), sharey=True) as (figure, [axes]):
        for axis, (curve, (label, key)) in zip(axes, _PANELS.items(), strict=True):
            found = [points[place] for place in curves[curve]]
            xs = [point["k"] if key == "k" else point["point"][key] for point in found]
            for name, look in looks.items():
                there = [
                    (x, one["variants"][name]) for x, one in zip(xs, found, strict=True) if name in one["variants"]
                ]
                seconds = [[1000 * one["step_seconds"][end] for _, one in there] for end in ("q25", "median", "q75")]
                style = look._asdict() | {"linestyle": _DASHES.get(name, "-")}
                band(axis, [x for x, _ in there], seconds, 0.15, **style)
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.set_xticks(xs, [number(x) for x in xs])
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_formatter(lambda value, _: number(value))
        axes[0].set_ylabel("step time (ms)")
        legend_below(figure, axes[0], columns=4)
        return save_figure(figure, folder, "figure_cost_curves", _words_curves(record, path, looks))


def _dots(
    axis: Any, place: int, look: Mark, values: list[float], mean: float, interval: tuple[float, float] | None
) -> None:
    """The tasks as small dots, the mean with its interval, and the mean as a number."""
    axis.plot(values, [place] * len(values), "o", color=look.color, alpha=0.45, markersize=3)
    if interval is not None:
        axis.plot(interval, [place, place], color=look.color, linewidth=2.2)
    axis.plot(mean, place, marker=look.marker, color=look.color, markersize=7)
    # Beside the panel, where no mark can lie.
    axis.annotate(f"{mean:.2f}", (1, place), (6, 0), ("axes fraction", "data"), "offset points", va="center")


def _memory(found: Mapping[str, Measured], name: str) -> float:
    return found[name].peak_training / found["full"].peak_training


def _printed_speed() -> dict[str, float]:
    """Variant -> steps per second over full fine-tuning's, of the paper's table 3."""
    printed = {one.method: float(one.paper) for one in printed_places(3) if one.quantity == "speed"}
    return {name: value / printed["full"] for name, value in printed.items()}


def _words_efficiency(
    evidence: EfficiencyEvidence,
    tasks: Mapping[str, Mapping[str, Measured]],
    looks: Mapping[str, Mark],
    labels: Labels,
) -> Words:
    facts = evidence.tasks[next(iter(tasks))].facts
    device, how = facts["device"], facts["treatment"]
    absolute = [
        f"{labels.task(task)} {np.mean(found['full'].steps_per_second):.3g} steps/s, "
        f"{found['full'].peak_training:,.0f} MB"
        for task, found in tasks.items()
    ]
    partly = [look.label for name, look in looks.items() if not all(name in found for found in tasks.values())]
    return Words(
        title="Speed and memory of training, relative to full fine-tuning",
        caption=(
            f"{facts['model']['title']} on {', '.join(map(labels.task, tasks))}, {device['name']} ({device['type']}, "
            f"{device['threads']} threads), {how['precision']}, batch {how['batch_size']}, padding {how['padding']}. "
            f"Marks: mean over the tasks, which are the small dots. Speed with a 95 % bootstrap interval over "
            f"{how['rounds']} interleaved rounds; memory is one measured step of the longest batch. Absolute, full "
            f"fine-tuning: {'; '.join(absolute)}."
        ),
        notes=(
            evidence.sentence,
            "The paper's marks are quotients of two steps per second printed in its Table 3, on an unknown device and "
            "batch (D22).",
            "Peak memory in training is not what the paper prints: its memory is taken to be an evaluation's (D21).",
            *(f"Not measured on every task: {label}." for label in partly),
            *dict.fromkeys(f"Warning: {w}." for record in evidence.tasks.values() for w in record.facts["warnings"]),
        ),
        source=relative_paths([evidence.tasks[task].path for task in tasks]),
    )


def _words_curves(record: Mapping[str, Any], path: str, looks: Mapping[str, Mark]) -> Words:
    base, decaying = (record["points"][record[name]] for name in ("base", "decaying"))
    device, how, point = record["device"], record["treatment"], base["point"]
    shape = f"{point['inner']:,} x {point['hidden']:,}"
    pairs = [
        f"folded over the paper's layer {pair['mean']:.2f} (operations {pair['flop']:.2f})"
        for pair in (found["pairs"]["folded_over_rotated_regular"] for found in (base, decaying))
    ]
    lora = [
        f"{looks[name].label.removeprefix('SparseGrad, ')} over LoRA {pair['mean']:.2f} (operations {pair['flop']:.2f})"
        for name, pair in ((n, base["pairs"].get(f"{n}_over_lora")) for n in ("truncated", "truncated_input"))
        if pair is not None
    ]
    return Words(
        title="Cost of one MLP's training step as k, tokens and width grow",
        caption=(
            f"Forward, backward and update of two matrices of {shape}, {point['tokens']:,} tokens, k = {base['k']:,} "
            f"({point['density']:.1%} of a matrix), LoRA of the same number of trained numbers (rank "
            f"{base['lora_rank']}); each panel changes one of them. {device['name']} ({device['type']}, "
            f"{device['threads']} threads), {how['precision']}; {_CLOCKS[how['clock']]}, median of {how['rounds']} "
            f"interleaved rounds, shaded: quartiles. At the common point: {pairs[0]}; "
            f"{'; '.join(lora)}. Where inputs and output gradients decay along the bases: {pairs[1]}."
        ),
        notes=(
            "The k largest entries are spread over all rows and columns here, the dearest case for the folded form: "
            "it folds back only rows and columns that hold an entry.",
            "The truncated form of the input side has a core of all outputs, so it needs a k of their number at least.",
            *(f"Warning: {warning}." for warning in record["warnings"]),
        ),
        source=relative_paths([path]),
    )
