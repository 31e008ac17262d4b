"""Figures 2 and 3 of the paper, from real gradients: what a rotation does to them, and where their zeros come from.

The paper's Figure 2 shows the weight gradient of BERT's fifth MLP before and after the rotation; its Figure 3 the
output gradient in rotated coordinates, striped by empty rows, and a histogram of its non-zero entries over training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune.report.figures import energy_evidence as energy
from finetune.report.figures.energy_evidence import KEPT, SPACES, Look, setting, spread
from finetune.report.figures.figure_style import (
    COLOURS,
    GREY,
    SEQUENTIAL,
    Words,
    band,
    legend_below,
    new_figure,
    relative_paths,
    save_figure,
)

FLOOR = 1e-3  # of the largest entry: what a map shows as its darkest
MAPS = {"original": "original gradient G", "initial": "HOSVD core V G Uᵀ", "released": "released code's V G U"}


def draw_figure_02(looks: Sequence[Look], model: str, folder: Path) -> list[Path]:
    """Weight gradients of the middle block before fine-tuning, original and rotated, and how few entries hold them.

    Of the first task; the model's name says whether it is the paper's. Files: ``figure_02.*``.

    Raises:
        ValueError: if heat maps are missing.
    """
    look = energy.fully_tuned(looks)
    maps, step = look.maps(), look.steps[0]
    with new_figure(11, 5.2, len(look.kinds), len(MAPS) + 1, width_ratios=[1, 1, 1, 1.35]) as (figure, axes):
        for row, kind in zip(axes, look.kinds, strict=True):
            [block] = _drawn(maps, f"step{step}.original.{kind}.")
            for axis, (space, title) in zip(row, MAPS.items(), strict=False):
                image = _heat(axis, maps[f"step{step}.{space}.{kind}.{block}"], look.shape(kind, block))
                axis.set_title(title)
                axis.set_xlabel("input coordinate")
            row[0].set_ylabel(f"{kind}, block {block}\noutput coordinate")
            _curves(row[-1], look, look.blocks(kind)[block])
        figure.colorbar(image, ax=axes[:, :-1], label="largest |entry| of a tile / largest of all", shrink=0.7)
        legend_below(figure, axes[0, -1])
        return save_figure(figure, folder, "figure_02", _words_02(look, model, block, len(image.get_array())))


def _curves(axis: Any, look: Look, place: int) -> None:
    shares = look.record["measure"]["shares"]
    for space in look.record["spaces"]:
        if space != "refreshed":  # at the first step it is the initial one
            values = look.record["steps"][0]["spaces"][space][place]["energy"]
            axis.plot(shares, values, **SPACES[space]._asdict())
    axis.axvline(KEPT, color=GREY, linestyle=":", linewidth=1)
    axis.annotate("1 %", (KEPT, 0.0), (3, 3), textcoords="offset points", fontsize=7, color=GREY)
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="share of the entries, largest first", ylabel="share of the energy")


def _words_02(look: Look, model: str, block: int, tiles: int) -> Words:
    found = []
    for kind in look.kinds:
        place = [*look.blocks(kind)].index(block)
        original, core, released, floor = (
            look.values(0, space, kind, "energy")[place] for space in ("original", "initial", "released", "random")
        )
        found.append(
            f"{kind}: {original:.2f} original, {core:.2f} HOSVD core, {released:.2f} released orientation, "
            f"{floor:.2f} random bases"
        )
    return Words(
        title="Figure 2: weight gradients before and after the rotation",
        caption=(
            f"{look.task}, step {look.steps[0]}, {setting(look)}. Left: gradients of the MLP matrices of block {block} "
            f"(counted from 0) of one batch, pooled to {tiles} x {tiles} tiles by the largest absolute value, on a "
            "logarithmic scale; each map is relative to its own largest entry. Right: share of the squared norm in the "
            f"largest entries, mean over the batches. In the largest 1 %: {'; '.join(found)}."
        ),
        notes=(
            energy.of_model(look, model),
            "The paper draws the fifth block of BERT; this is the middle block of this model.",
            "Colours of the maps saturate below a thousandth of the largest entry.",
            energy.ANOTHER_HEAD,
        ),
        source=relative_paths([look.path, look.path.with_suffix(".safetensors")]),
    )


def draw_figure_03(looks: Sequence[Look], model: str, folder: Path) -> list[Path]:
    """Output gradients in rotated coordinates, token by token, and their non-zero and large entries over training.

    As :func:`draw_figure_02`: ``figure_03.*``.

    Raises:
        ValueError: if heat maps are missing.
    """
    look = energy.fully_tuned(looks)
    maps, step = look.maps(), look.steps[0]
    with new_figure(12, 5.8, len(look.kinds), 4, width_ratios=[1, 1, 1.1, 1.3]) as (figure, axes):
        for row, kind in zip(axes, look.kinds, strict=True):
            prefix = f"step{step}.output.initial.{kind}."
            blocks = _drawn(maps, prefix)
            for axis, block in zip(row[:2], (blocks[0], blocks[-1]), strict=True):
                rows = maps[prefix + str(block)]
                image = _heat(axis, rows, (len(rows), look.shape(kind, block)[0]))
                _mark_padding(axis, maps[f"step{step}.padding"][: len(rows)])
                axis.set_title(f"{kind}, block {block}" + (" (last)" if block == max(look.blocks(kind)) else ""))
                axis.set_xlabel("rotated output coordinate")
            row[0].set_ylabel("token of a batch (bar: padding)")
            _histogram(row[2], look, kind)
            _over_training(row[3], look, kind)
        figure.colorbar(image, ax=axes[:, :2], label="|entry| / largest of all", shrink=0.7)
        legend_below(figure, axes[0, 3], axes[0, 2])
        return save_figure(figure, folder, "figure_03", _words_03(look, model))


def _histogram(axis: Any, look: Look, kind: str) -> None:
    """Training steps by percent of non-zero entries, the last block apart: its zeros have another cause."""
    *others, last = (look.record["nonzero_percent_of_training_steps"][place] for place in look.blocks(kind).values())
    for name, counts, colour in (("blocks but the last", others, "full"), ("last block", [last], "lora")):
        if found := [(int(percent), number) for one in counts for percent, number in one.items()]:
            percents, numbers = zip(*found, strict=True)
            bins, label = range(0, 106, 5), f"training steps, {name}"
            axis.hist(percents, bins=bins, weights=numbers, color=COLOURS[colour], alpha=0.8, label=label)
    axis.set(xlabel="% of ∂L/∂Y that is not zero", ylabel="training steps × blocks", xlim=(0, 105))


def _over_training(axis: Any, look: Look, kind: str) -> None:
    def large(space: str) -> Callable[[Mapping[str, Any], int], float]:
        return lambda step, place: step["spaces"][space][place]["large"][0]

    def output(name: str) -> Callable[[Mapping[str, Any], int], float]:
        return lambda step, place: step["output_gradients"][place][name]

    level = f"at least {100 * look.record['measure']['levels'][0]:g} % of the largest"
    lines = (
        ("∂L/∂Y, not zero", GREY, "x", output("nonzero")),
        (f"∂L/∂Ỹ, {level}", COLOURS["rotated"], "s", output("large_initial")),
        (f"∂L/∂W, {level}", SPACES["original"].color, "o", large("original")),
        (f"∂L/∂W̃, {level}", SPACES["initial"].color, "D", large("initial")),
    )
    for name, colour, marker, take in lines:
        found = [[100 * take(step, place) for place in look.blocks(kind).values()] for step in look.record["steps"]]
        ends = [[of(one) for one in found] for of in (min, fmean, max)]
        band(axis, look.steps, ends, 0.08, color=colour, marker=marker, label=name)
    axis.set(xlabel="training step", ylabel="% of the entries", ylim=(0, 100))


def _words_03(look: Look, model: str) -> Words:
    first = look.record["steps"][0]["output_gradients"]
    inner, last = [], []
    for kind in look.kinds:
        *others, end = (first[place] for place in look.blocks(kind).values())
        inner, last = [*inner, *others], [*last, end]
    inner = inner or last
    padding = fmean(one["padding"] for one in inner)
    other, text = (fmean(one["zero_rows"] - one["zero_rows_padding"] for one in part) for part in (inner, last))
    zero = [v for space in ("original", "initial") for kind in look.kinds for v in look.values(0, space, kind, "zero")]
    padded = "the longest of a batch" if look.record["padding"] == "longest" else "a fixed length"
    return Words(
        title="Figure 3: the striped output gradient, and its non-zero and large entries over training",
        caption=(
            f"{look.task}, {look.trajectory}, {setting(look)}, padded to {padded}. Left: rows of the output gradient "
            f"in rotated coordinates at step {look.steps[0]}, one a token, those of padding marked. Before training "
            f"{padding:.0%} of the rows are padding; in all blocks but the last {other:.1%} of the rows are zero "
            f"without being padding, in the last block {text:.0%} (every token that the head does not read). "
            "Middle: training steps by percent of non-zero entries. Right: share of non-zero entries, and of entries "
            "that are large against the largest of their matrix; line: mean over blocks, band: their range."
        ),
        notes=(
            energy.of_model(look, model),
            f"No weight gradient has a zero worth the name: share of exactly zero entries {spread(zero)}, over blocks.",
            "Counts of non-zero entries are of the original output gradient. The rotation keeps which rows are zero "
            "and fills single zeros, such as those of the dropout behind the down layers.",
        ),
        source=relative_paths([look.path, look.path.with_suffix(".safetensors")]),
    )


def _heat(axis: Any, values: Any, shape: tuple[int, int]) -> Any:
    """A map on a logarithmic scale; a row of zeros is drawn as nothing."""
    import numpy as np
    from matplotlib.colors import LogNorm

    empty = np.broadcast_to((values == 0).all(axis=1, keepdims=True), values.shape)
    shown = np.ma.masked_where(empty, np.clip(values, FLOOR, 1))
    axis.grid(False)
    extent, norm = (0, shape[1], shape[0], 0), LogNorm(FLOOR, 1)
    return axis.imshow(shown, aspect="auto", cmap=SEQUENTIAL, norm=norm, extent=extent, interpolation="nearest")


def _mark_padding(axis: Any, padding: Any) -> None:
    """A bar left of the rows that are padding."""
    axis.tick_params(axis="y", pad=9)
    for row, pad in enumerate(padding):
        if pad:
            axis.axvspan(-0.04, -0.01, 1 - (row + 1) / len(padding), 1 - row / len(padding), clip_on=False).set(
                transform=axis.transAxes, color=COLOURS["truncated"], linewidth=0
            )


def _drawn(maps: Mapping[str, Any], prefix: str) -> list[int]:
    """The blocks that there are maps of, rising."""
    blocks = sorted(int(name.removeprefix(prefix)) for name in maps if name.startswith(prefix))
    if not blocks:
        raise ValueError(f"no heat map {prefix}*: run the energy stage again.")
    return blocks
