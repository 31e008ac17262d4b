"""Weights & Biases as a mirror of a run; the record is the source. Offline unless asked, and never in the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODES = ("offline", "online", "disabled")


class Tracker:
    """Logs scalars with explicit steps; does nothing when disabled.

    Use as a context manager: the run is closed even when training fails, so that the next one starts clean.

    Args:
        mode: ``offline`` (files under ``folder``), ``online`` (needs WANDB_API_KEY in the environment), ``disabled``.
        folder: where wandb keeps its files.
        run_id: from the configuration's hash: an offline run can't be resumed, a synced one is found again.
        project, group, job_type, name, config: as in ``wandb.init``.

    Raises:
        ValueError: on an unknown mode.
        ImportError: if wandb is not installed and the mode is not ``disabled``; the message says what to do.
    """

    def __init__(
        self,
        mode: str,
        folder: str | Path,
        *,
        project: str,
        run_id: str,
        group: str,
        job_type: str,
        name: str,
        config: Mapping[str, Any],
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"wandb.mode={mode!r}; allowed: {', '.join(MODES)}.")
        self._run = None
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            raise ImportError("wandb is not installed: pip install wandb, or set wandb.mode=disabled.") from None
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=mode,
            dir=str(folder),
            project=project,
            id=run_id,
            group=group,
            job_type=job_type,
            name=name,
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", x_disable_meta=False),
        )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars at an optimizer step."""
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values of the run."""
        if self._run is not None:
            self._run.summary.update(dict(values))
