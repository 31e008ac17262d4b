"""How fast a basis goes stale: energy in the largest 1 % of entries and in the leading block, while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from finetune.report.figures.energy_evidence import ANOTHER_HEAD, SPACES, Look, of_model, setting, spread
from finetune.report.figures.figure_style import Words, band, legend_below, new_figure, relative_paths, save_figure

PARTS = {"energy": "largest 1 % of the entries", "block": "leading block"}
NAMED = ("original", "released", "stored", "initial", "refreshed")  # in the caption


def draw_figure_energy(looks: Sequence[Look], model: str, folder: Path) -> list[Path]:
    """Energy in the largest 1 % of the entries and in the leading block, by layer kind: ``figure_energy.*``.

    One row a task and trajectory; the model's name says whether it is the paper's.
    """
    panels = [(part, kind) for part in PARTS for kind in looks[0].kinds]
    height = 2.1 * len(looks) + 1.1
    with new_figure(3 * len(panels), height, len(looks), len(panels), sharey=True) as (figure, axes):
        for row, look in zip(axes, looks, strict=True):
            for axis, (part, kind) in zip(row, panels, strict=True):
                _panel(axis, look, part, kind)
            row[0].set_ylabel(f"{look.task}\n{look.trajectory}\nshare of the energy")
        for axis, (part, kind) in zip(axes[0], panels, strict=True):
            axis.set_title(f"{kind}: {PARTS[part]}")
        for axis in axes[-1]:
            axis.set_xlabel("training step")
        legend_below(figure, axes[0, 0])
        return save_figure(figure, folder, "figure_energy", _words(looks, model))


def _panel(axis: Any, look: Look, part: str, kind: str) -> None:
    for space in look.record["spaces"]:
        found = [look.values(number, space, kind, part) for number in range(len(look.steps))]
        points = [(mean(one), stdev(one) if len(one) > 1 else 0.0) for one in found]
        lines = [(max(0.0, middle - sd), middle, min(1.0, middle + sd)) for middle, sd in points]
        band(axis, look.steps, list(zip(*lines, strict=True)), 0.1, **SPACES[space]._asdict())
    axis.set_ylim(0, 1.02)


def _words(looks: Sequence[Look], model: str) -> Words:
    first = looks[0]
    blocks = sorted({"x".join(map(str, layer["block"])) for layer in first.record["layers"]})
    notes = [of_model(first, model), ANOTHER_HEAD]
    for look in looks:
        for part, words in PARTS.items():
            for kind in look.kinds:
                found = {space: [spread(look.values(step, space, kind, part)) for step in (0, -1)] for space in NAMED}
                ends = ", ".join(f"{SPACES[space].label} {start} to {end}" for space, (start, end) in found.items())
                span = f"steps {look.steps[0]} to {look.steps[-1]}"
                notes.append(f"{look.task}, {look.trajectory}, {kind}, {words}, {span}: {ends}.")
    scores = [
        f"{look.task}, {look.trajectory}: {look.record['metric']} "
        + ", ".join(f"{step['score']:.3f} (step {step['step']})" for step in look.record["steps"])
        for look in looks
    ]
    notes.append(f"Validation score at these steps: {'; '.join(scores)}. One seed each.")
    return Words(
        title="Energy of gradients over training, in six spaces",
        caption=(
            f"{setting(first)}. Lines: mean over the blocks; bands: one standard deviation over them. Left: share of "
            "the squared norm in the largest 1 % of the entries; right: in the leading block of as many entries, "
            f"{' and '.join(blocks)}, which the truncated form trains. All bases are of "
            f"{first.record['refresh_batches']} batches and judged on others; random bases are the floor."
        ),
        notes=tuple(notes),
        source=relative_paths([look.path for look in looks]),
    )
