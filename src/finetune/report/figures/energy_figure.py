"""How fast a basis goes stale: energy in the largest 1 % of entries and in the leading block, while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from finetune.report.figures.energy_evidence import ANOTHER_HEAD, SPACES, Look, of_model, setting, spread
from finetune.report.figures.figure_style import Words, new_figure, relative_paths, save_figure

KEPT = 0.01  # the paper's share of entries (D1)
NAMED = ("original", "released", "stored", "initial", "refreshed")  # in the caption


def draw_figure_energy(looks: Sequence[Look], model: str, folder: Path) -> list[Path]:
    """One row a task and trajectory: energy in the largest 1 % of the entries and in the leading block, by layer kind.

    Args:
        looks: of :func:`finetune.report.figures.energy_evidence.read_looks`.
        model: identity, to say whether it is the paper's.
        folder: for the files ``figure_energy.*``.
    """
    kinds = looks[0].kinds
    panels = [(name, kind) for name in ("energy", "block") for kind in kinds]
    height = 2.1 * len(looks) + 1.1
    with new_figure(3 * len(panels), height, len(looks), len(panels), sharey=True) as (figure, axes):
        for row, look in zip(axes, looks, strict=True):
            for axis, (name, kind) in zip(row, panels, strict=True):
                _panel(axis, look, name, kind)
            row[0].set_ylabel(f"{look.task}\n{look.trajectory}\nshare of the energy")
        for axis, (name, kind) in zip(axes[0], panels, strict=True):
            axis.set_title(f"{kind}: {'largest 1 % of the entries' if name == 'energy' else 'leading block'}")
        for axis in axes[-1]:
            axis.set_xlabel("training step")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return save_figure(figure, folder, "figure_energy", _words(looks, model))


def _panel(axis: Any, look: Look, name: str, kind: str) -> None:
    for space in look.record["spaces"]:
        drawn = SPACES[space]
        values = [_values(look, number, space, kind, name) for number in range(len(look.steps))]
        middle = [mean(one) for one in values]
        spreads = [stdev(one) if len(one) > 1 else 0.0 for one in values]
        axis.plot(look.steps, middle, color=drawn.colour, marker=drawn.marker, label=drawn.label)
        low = [max(0.0, m - s) for m, s in zip(middle, spreads, strict=True)]
        high = [min(1.0, m + s) for m, s in zip(middle, spreads, strict=True)]
        axis.fill_between(look.steps, low, high, color=drawn.colour, alpha=0.1, linewidth=0)
    axis.set_ylim(0, 1.02)


def _values(look: Look, number: int, space: str, kind: str, name: str) -> list[float]:
    return look.values(number, space, kind, name, KEPT if name == "energy" else None)


def _words(looks: Sequence[Look], model: str) -> Words:
    first = looks[0]
    blocks = sorted({"x".join(map(str, layer["block"])) for layer in first.record["layers"]})
    notes = [of_model(first, model), ANOTHER_HEAD]
    for look in looks:
        for name, words in (("energy", "largest 1 % of the entries"), ("block", "leading block")):
            for kind in look.kinds:
                ends = ", ".join(
                    f"{SPACES[space].label} {spread(_values(look, 0, space, kind, name))} to "
                    f"{spread(_values(look, -1, space, kind, name))}"
                    for space in NAMED
                )
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
