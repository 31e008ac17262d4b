"""Speed and memory as pictures: all variants over full fine-tuning; a step's cost as k, tokens and width grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.published import TASKS, paper_table
from finetune.report.evidence.efficiency_evidence import EfficiencyEvidence, Measured
from finetune.report.evidence.evidence import read_key
from finetune.report.figures.figure_style import COLOURS, GREY, Words, new_figure, number, relative_paths, save_figure
from finetune.report.tables import efficiency_notes
from finetune.report.tables.efficiency_tables import ROWS
from finetune.stats import intervals as stats

LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA (peft)",
    "meprop": "MeProp",
    "rotated_regular": "SparseGrad, the paper's layer",
    "rotated_sparse_by_dense": "the same, sparse by dense",
    "folded": "SparseGrad, folded",
    "truncated": "SparseGrad, truncated",
    "truncated_input": "SparseGrad, truncated (inputs)",
    "floor": "frozen layer: the floor",
}
"""Variant -> its name in figures; in this order from top to bottom."""

_COLOUR = {
    "full": COLOURS["full"],
    "lora": COLOURS["lora"],
    "meprop": COLOURS["meprop"],
    "rotated_regular": COLOURS["rotated"],
    "rotated_sparse_by_dense": COLOURS["rotated"],
    "folded": COLOURS["sparsegrad"],
    "truncated": COLOURS["truncated"],
    "truncated_input": COLOURS["truncated"],
    "floor": GREY,
}
_MARKER = dict(zip(LABELS, "os^DvPX*.", strict=True))
_CLOCKS = {"wall": "time by the clock", "cpu": "time that the process ran, whatever others took"}
_PANELS = {
    "k": ("entries kept, k", "k"),
    "tokens": ("tokens in the step", "tokens"),
    "width": ("width of the model, hidden size", "hidden"),
}


def draw_figure_efficiency(evidence: EfficiencyEvidence, folder: Path, *, seed: int = 0) -> list[Path]:
    """Steps per second and peak training memory of every variant, over full fine-tuning's.

    Args:
        evidence: of :func:`finetune.report.evidence.efficiency_evidence.collect_efficiency_evidence`.
        folder: for the files ``figure_efficiency.*``.
        seed: of the bootstrap behind the intervals of speed.

    Returns:
        The three paths.

    Raises:
        ValueError: if no task has a record with full fine-tuning in it.
    """
    tasks = {task: record.variants for task, record in evidence.tasks.items() if "full" in record.variants}
    if not tasks:
        raise ValueError(f"no finished record of full fine-tuning in {evidence.experiment}: run the efficiency stage.")
    names = [name for name in LABELS if any(name in found for found in tasks.values())]
    printed = _printed_speed()
    with new_figure(9, 0.42 * len(names) + 1.3, 1, 2, sharey=True) as (figure, [[left, right]]):
        for place, name in enumerate(names):
            speed = {task: found[name].ratios for task, found in tasks.items() if name in found}
            memory = {task: _memory(found, name) for task, found in tasks.items() if name in found}
            mean = stats.bootstrap([*speed.values()], seed=seed)
            _dots(left, place, name, [float(np.mean(rounds)) for rounds in speed.values()], mean)
            _dots(right, place, name, list(memory.values()), stats.Estimate(np.mean([*memory.values()]), None, None, 1))
            if name in printed and name != "full":
                label = None if left.get_legend_handles_labels()[1] else "printed in the paper (RoBERTa-base)"
                left.plot(printed[name], place + 0.3, "d", mfc="none", mec=GREY, ms=5, label=label)
        left.set_xlabel("steps per second (full fine-tuning = 1)\nright is faster")
        right.set_xlabel("peak memory in training (full fine-tuning = 1)\nleft is leaner")
        left.set_yticks(range(len(names)), [LABELS[name] for name in names])
        left.invert_yaxis()
        for axis in (left, right):
            axis.locator_params(axis="x", nbins=6)
            axis.axvline(1, color=GREY, linewidth=1)
            axis.grid(False, axis="y")
        left.set_xlim(left=0)
        if left.get_legend_handles_labels()[1]:
            figure.legend(loc="outside lower left")
        return save_figure(figure, folder, "figure_efficiency", _words_efficiency(evidence, tasks, names))


def draw_figure_cost_curves(record: Mapping[str, Any], path: str, folder: Path) -> list[Path]:
    """Milliseconds of one MLP's training step over k, tokens and width, both axes logarithmic.

    Args:
        record: of :func:`finetune.efficiency.cost_curves.cost_curves`.
        path: of the record.
        folder: for the files ``figure_cost_curves.*``.

    Returns:
        The three paths.

    Raises:
        ValueError: if the record is of another kind or incomplete.
    """
    if read_key(path, record, "run", "kind") != "cost_curves":
        raise ValueError(f"{path} is a record of {record['run']['kind']!r}, no cost curves.")
    curves, points = read_key(path, record, "curves"), read_key(path, record, "points")
    names = [name for name in LABELS if name in points[record["base"]]["variants"]]
    with new_figure(10, 4.2, 1, len(_PANELS), sharey=True) as (figure, [axes]):
        for axis, (curve, (label, key)) in zip(axes, _PANELS.items(), strict=True):
            found = [points[place] for place in curves[curve]]
            xs = [point["k"] if key == "k" else point["point"][key] for point in found]
            for name in names:
                _curve(axis, name, xs, [point["variants"].get(name) for point in found])
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.set_xticks(xs, [number(x) for x in xs])
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_formatter(lambda value, _: number(value))
        axes[0].set_ylabel("step time (ms)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return save_figure(figure, folder, "figure_cost_curves", _words_curves(record, path))


def _curve(axis: Any, name: str, xs: list[float], variants: list[Mapping[str, Any] | None]) -> None:
    """Medians with quartiles, in milliseconds, where the variant was measured."""
    there = [(x, variant["step_seconds"]) for x, variant in zip(xs, variants, strict=True) if variant is not None]
    xs = [x for x, _ in there]
    low, middle, high = ([1000 * times[end] for _, times in there] for end in ("q25", "median", "q75"))
    line = {"floor": "--", "truncated_input": "-."}.get(name, "-")
    axis.plot(xs, middle, line, color=_COLOUR[name], marker=_MARKER[name], label=LABELS[name])
    axis.fill_between(xs, low, high, color=_COLOUR[name], alpha=0.15, linewidth=0)


def _dots(axis: Any, place: int, name: str, values: list[float], mean: stats.Estimate) -> None:
    """The mean with its interval, the tasks as small dots, and the mean as a number."""
    colour = _COLOUR[name]
    axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=3)
    if mean.low is not None and name != "full":
        axis.plot([mean.low, mean.high], [place, place], color=colour, linewidth=2.2)
    axis.plot(mean.mean, place, marker=_MARKER[name], color=colour, markersize=7)
    # Beside the panel, where no mark can lie.
    axis.annotate(f"{mean.mean:.2f}", (1, place), (6, 0), ("axes fraction", "data"), "offset points", va="center")


def _memory(found: Mapping[str, Measured], name: str) -> float:
    return found[name].peak_training / found["full"].peak_training


def _printed_speed() -> dict[str, float]:
    """Variant -> steps per second over full fine-tuning's, of the paper's table 3."""
    printed = {ROWS[line["row"]]: float(line["value"]) for line in paper_table(3) if line["column"] == "Steps/Sec."}
    return {name: value / printed["full"] for name, value in printed.items()}


def _words_efficiency(
    evidence: EfficiencyEvidence, tasks: Mapping[str, Mapping[str, Measured]], names: list[str]
) -> Words:
    facts = evidence.tasks[next(iter(tasks))].facts
    device, how = facts["device"], facts["treatment"]
    over = ", ".join(TASKS[task] for task in tasks)
    return Words(
        title="Speed and memory of training, relative to full fine-tuning",
        caption=(
            f"{facts['model']['title']} on {over}, {device['name']} ({device['type']}, {device['threads']} threads), "
            f"{how['precision']}, batch {how['batch_size']}, padding {how['padding']}. Marks: mean over the tasks, "
            f"which are the small dots. Speed with a 95 % bootstrap interval over {how['rounds']} interleaved "
            f"rounds; memory is one measured step of the longest batch. Absolute, full fine-tuning: "
            f"{'; '.join(_absolute(task, found['full']) for task, found in tasks.items())}."
        ),
        notes=(
            *efficiency_notes.places(evidence),
            "The paper's marks are quotients of two steps per second printed in its Table 3, on an unknown device and "
            "batch (D22).",
            "Peak memory in training is not what the paper prints: its memory is taken to be an evaluation's (D21).",
            *(
                f"Not measured on every task: {LABELS[name]}."
                for name in names
                if not all(name in found for found in tasks.values())
            ),
            *dict.fromkeys(f"Warning: {w}." for record in evidence.tasks.values() for w in record.facts["warnings"]),
        ),
        source=relative_paths([evidence.tasks[task].path for task in tasks]),
    )


def _absolute(task: str, full: Measured) -> str:
    return f"{TASKS[task]} {np.mean(full.steps_per_second):.3g} steps/s, {full.peak_training:,.0f} MB"


def _words_curves(record: Mapping[str, Any], path: str) -> Words:
    base, decaying = (record["points"][record[name]] for name in ("base", "decaying"))
    device, how, point = record["device"], record["treatment"], base["point"]
    shape = f"{point['inner']:,} x {point['hidden']:,}"
    pairs = [
        f"folded over the paper's layer {pair['mean']:.2f} (operations {pair['flop']:.2f})"
        for pair in (found["pairs"]["folded_over_rotated_regular"] for found in (base, decaying))
    ]
    lora = [
        f"{LABELS[name].removeprefix('SparseGrad, ')} over LoRA {pair['mean']:.2f} (operations {pair['flop']:.2f})"
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
