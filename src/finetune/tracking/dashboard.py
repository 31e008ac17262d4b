"""The wandb workspace as code: which panels stand where, by the names of :mod:`finetune.tracking.tracker`.

:func:`sections` says it in plain data; :func:`build` makes wandb-workspaces' objects of it, :func:`serialise` the JSON
that wandb is sent, :func:`publish` sends it. Building and serialising need no account and no network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.tracking.tracker import (
    STEP_SECONDS,
    TRAIN_LOSS,
    TRIAL_BATCH,
    TRIAL_BEST,
    TRIAL_RATE,
    TRIAL_SCORE,
    TRIAL_SECONDS,
    VALIDATION,
    VARIANT_METRICS,
)

NAME = "SparseGrad: four methods, one protocol"
WIDTH, COLUMNS, HEIGHT = 24, 3, 8
"""Columns of wandb's grid, panels beside each other, and a panel's height."""

METHOD, TASK, MODEL = "run.method", "run.task", "run.model"
"""Keys of a run's configuration by which panels and runs are grouped."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        kind: ``line`` (over steps, or over ``x``), ``bar`` (last values, one bar a group) or ``text``.
        title: heading; of ``text`` the Markdown itself.
        metrics: names of :mod:`finetune.tracking.tracker`.
        x: the metric of the horizontal axis; None: steps.
        group: by which key of the configuration curves or bars are averaged; None: one for each run.
        log_x, log_y: logarithmic axes.
    """

    kind: str
    title: str
    metrics: Sequence[str] = ()
    x: str | None = None
    group: str | None = METHOD
    log_x: bool = False
    log_y: bool = False


_HOW_TO_READ = """Runs are grouped by task and model; a curve is the mean of a method's runs, the band their range.
Open one task at a time: the scores of two tasks have no common mean. Job types: `train` are report seeds, `trial` the
runs of a search, `search` its result, `efficiency` the timings. Records in the repository are the source; this page is
a mirror of them."""

Sections = tuple[tuple[str, tuple[Panel, ...]], ...]

_OF_RUNS: Sections = (
    ("How to read this", (Panel("text", _HOW_TO_READ),)),
    (
        "Scores",
        (
            Panel("bar", "Best validation score", ["score"]),
            Panel("line", "Validation loss", [f"{VALIDATION}loss"]),
            Panel("line", "Matthews correlation", [f"{VALIDATION}matthews_correlation"]),
            Panel("line", "Pearson correlation", [f"{VALIDATION}pearson"]),
            Panel("line", "Accuracy", [f"{VALIDATION}accuracy"]),
            Panel("line", "F1, of two classes", [f"{VALIDATION}f1"]),
        ),
    ),
    (
        "Training",
        (
            Panel("line", "Training loss", [TRAIN_LOSS], log_y=True),
            Panel("line", "Seconds a step", [STEP_SECONDS]),
            Panel("bar", "Steps until the run ended", ["training.steps"]),
            Panel("bar", "Median seconds a step", ["training.step_seconds_median"]),
            Panel("bar", "Seconds in all", ["training.seconds"]),
        ),
    ),
    (
        "Memory, bytes",
        (
            Panel("bar", "Peak in training (CUDA)", ["memory.peak_training"]),
            Panel("bar", "Peak in evaluation (CUDA)", ["memory.peak_evaluation"]),
            Panel("bar", "Optimizer state", ["memory.optimizer_state"]),
            Panel("bar", "Gradients", ["memory.gradients"]),
            Panel("bar", "Saved activations", ["memory.saved_activations"]),
            Panel("bar", "Parameters and bases", ["memory.parameters", "memory.bases"]),
            Panel("bar", "Trained numbers", ["parameters.trainable"]),
            Panel("bar", "Trained numbers of an MLP matrix", ["parameters.trainable_per_layer"]),
        ),
    ),
    (
        "Search",
        (
            Panel("line", "Best so far, by trial", [TRIAL_BEST]),
            Panel("line", "Score by learning rate", [TRIAL_SCORE], x=TRIAL_RATE, group=None, log_x=True),
            Panel("line", "Score by batch size", [TRIAL_SCORE], x=TRIAL_BATCH, group=None),
            Panel("line", "Seconds of a trial", [TRIAL_SECONDS]),
        ),
    ),
)
_OF_VARIANTS = ("Steps a second", "Peak in training, bytes", "Peak in evaluation, bytes")


def sections(variants: Sequence[str]) -> Sections:
    """Titles of the sections, and their panels.

    Args:
        variants: names of what efficiency runs measure (:mod:`finetune.efficiency.variants`).
    """
    panels = tuple(
        Panel("bar", title, [f"{variant}.{name}" for variant in variants], group=MODEL)
        for name, title in zip(VARIANT_METRICS, _OF_VARIANTS, strict=True)
    )
    return (*_OF_RUNS, ("Efficiency: all forms on one machine", panels))


def metrics(shown: Sections) -> set[str]:
    """Every metric that a panel names."""
    panels = [panel for _, section in shown for panel in section]
    return {name for panel in panels for name in (*panel.metrics, *([panel.x] if panel.x else []))}


def build(entity: str, project: str, shown: Sections) -> Any:
    """The workspace (``wandb_workspaces.workspaces.Workspace``) of :func:`sections`.

    Raises:
        ValueError: if wandb-workspaces is not installed.
    """
    ws = _workspaces()
    made = [
        ws.Section(name=title, is_open=True, panels=[_panel(panel, place) for place, panel in enumerate(section)])
        for title, section in shown
    ]
    runs = ws.RunsetSettings(groupby=[ws.Config(TASK), ws.Config(MODEL), ws.Config(METHOD)])
    settings = ws.WorkspaceSettings(max_runs=100)
    return ws.Workspace(
        entity=entity, project=project, name=NAME, sections=made, settings=settings, runset_settings=runs
    )


def serialise(workspace: Any) -> str:
    """The workspace as wandb-workspaces sends it: JSON.

    ``_to_model`` is what its ``save`` calls; it has no public counterpart in 0.4.
    """
    return workspace._to_model().model_dump_json(by_alias=True, indent=1)


def publish(workspace: Any) -> str:
    """Save the workspace as a view of its project; returns its address.

    Raises:
        ValueError: if WANDB_API_KEY is not set, or wandb refuses.
    """
    if not os.environ.get("WANDB_API_KEY"):
        raise ValueError(
            "WANDB_API_KEY is not set: get a key at https://wandb.ai/authorize and set it in the environment."
        )
    try:
        return workspace.save().url
    except Exception as error:  # wandb's, requests', graphql's: the user needs the sentence, not the class
        raise ValueError(f"wandb did not take the workspace: {' '.join(str(error).split())}") from None


def _panel(panel: Panel, place: int) -> Any:
    import wandb_workspaces.reports.v2 as wr

    width = WIDTH // COLUMNS
    if panel.kind == "text":
        return wr.MarkdownPanel(panel.title, layout=wr.Layout(x=0, y=0, w=WIDTH, h=HEIGHT // 2))
    layout = wr.Layout(x=place % COLUMNS * width, y=place // COLUMNS * HEIGHT, w=width, h=HEIGHT)
    group = None if panel.group is None else wr.Config(panel.group)
    common = {"title": panel.title, "groupby": group, "aggregate": True if group else None, "layout": layout}
    if panel.kind == "bar":
        return wr.BarPlot(metrics=list(panel.metrics), groupby_aggfunc="mean", groupby_rangefunc="minmax", **common)
    band = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"} if group is not None else {}
    axes = {"log_x": panel.log_x or None, "log_y": panel.log_y or None}
    return wr.LinePlot(x=panel.x or "Step", y=list(panel.metrics), **axes, **band, **common)


def _workspaces() -> Any:
    try:
        import wandb_workspaces.workspaces
    except ImportError:
        raise ValueError("wandb-workspaces is not installed: pip install wandb-workspaces.") from None
    return wandb_workspaces.workspaces
