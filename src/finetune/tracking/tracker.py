"""Weights & Biases as a mirror of a run; the record is the source. Offline unless asked, and never in the way.

The names of everything that is logged stand here: the training loop, the searches and the dashboard take them from this
module. A metric of a validation is ``validation/<name>``, <name> as
:mod:`finetune.training.evaluation` gives it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.store import records

log = logging.getLogger(__name__)

TRAIN_LOSS, STEP_SECONDS, VALIDATION = "train/loss", "train/step_seconds", "validation/"
TRIAL_SCORE, TRIAL_BEST, TRIAL_RATE, TRIAL_BATCH, TRIAL_SECONDS = (
    f"trial/{name}" for name in ("score", "best", "learning_rate", "batch_size", "seconds")
)
CONFIG = ("run", "hyperparameters", "model", "data", "config", "treatment", "basis", "device", "provenance")
SUMMARY = ("status", "error", "metric", "score", "baseline", "parameters", "training", "memory")
"""Entries of a training record that a run of wandb gets as its configuration and as its summary."""

VARIANT_METRICS = ("steps_per_second", "peak_training", "peak_evaluation")
"""Numbers of each variant in the summary of an efficiency run: ``<variant>.<name>``."""

JOB_TYPES = {"search": "trial", "llama": "train"}
"""Kind of a record -> wandb's job type, where they differ; the search itself is the job ``search``."""


def run_id(run: Mapping[str, Any]) -> str:
    """wandb's id of a record, from its ``run``, the configuration's hash in it: the same however often it is sent."""
    return records.config_hash(run)


def group_of(run: Mapping[str, Any]) -> str:
    """experiment/model/method, as far as a record has them."""
    return "/".join(str(run[name]) for name in ("experiment", "model", "method") if run.get(name))


def name_of(run: Mapping[str, Any]) -> str:
    """What a run is called in a list of runs."""
    parts = [run.get("model"), run.get("method"), run.get("task")]
    parts += [f"seed {run['seed']}"] if run.get("seed") is not None else []
    return " ".join(str(part) for part in parts if part)


def chosen(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The entries of a record that have one of these names."""
    return {name: record[name] for name in names if name in record}


class Tracker:
    """Logs scalars with explicit steps; does nothing when disabled.

    Nothing of wandb ends or blocks a run: without the package, a key or a network it is said once in the log, and the
    run goes on; what is offline can be sent later (``wandb sync``).

    Use as a context manager: the run is closed even when training fails, so that the next one starts clean.

    Args:
        mode: ``offline`` (files under ``folder``), ``online`` (needs WANDB_API_KEY in the environment), ``disabled``.
        folder: where wandb keeps its files.
        run_id: see :func:`run_id`: an offline run can't be resumed, a synced one is found again.
        project, group, job_type, name, config: as in ``wandb.init``.

    Attributes:
        mode: what there is in the end: ``disabled`` where wandb is absent, ``offline`` where online was not to be had.

    Raises:
        ValueError: on an unknown mode.
    """

    FINISH_SECONDS = 120  # that the end of an online run may wait for its upload; what is left stays on the disk

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
        self._run: Any = None
        self.mode = "disabled"
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            log.warning(
                "wandb is not installed: %s is not tracked. pip install wandb, or set wandb.mode=disabled.", name
            )
            return
        settings = {"silent": True, "console": "off", "finish_timeout": self.FINISH_SECONDS}
        arguments = {
            "dir": str(folder),
            "project": project,
            "id": run_id,
            "group": group,
            "job_type": job_type,
            "name": name,
            "config": dict(config),
        }
        for attempt in _attempts(wandb, mode):
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                self._run = wandb.init(mode=attempt, settings=wandb.Settings(**settings), **arguments)
                self.mode = attempt
                return
            except Exception as error:  # of whatever kind: wandb raises its own, requests', and the system's
                log.warning("wandb can't start a run %s (%s); the run goes on", attempt, _one_line(error))

    @classmethod
    def of_run(
        cls, run: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any], job_type: str
    ) -> Tracker:
        """The tracker of what a record's ``run`` names.

        Args:
            run: experiment, kind, model, method, task and seed, as far as there are such; the configuration's hash.
            settings: ``mode``, ``folder`` and ``project``.
            config: for readers.
            job_type: wandb's.
        """
        names = {"run_id": run_id(run), "group": group_of(run), "name": name_of(run)}
        return cls(
            settings["mode"],
            settings["folder"],
            project=settings["project"],
            job_type=job_type,
            config=config,
            **names,
        )

    @classmethod
    def of_record(cls, record: Mapping[str, Any], settings: Mapping[str, Any], *, main_process: bool = True) -> Tracker:
        """The tracker of a training record that is about to be filled.

        Args:
            record: with ``run``; see :data:`CONFIG`.
            settings: as in :meth:`of_run`.
            main_process: of several processes the first one tracks.
        """
        run = record["run"]
        mode = {} if main_process else {"mode": "disabled"}
        kind: str = run["kind"]
        job_type = JOB_TYPES.get(kind, kind)
        return cls.of_run(run, {**settings, **mode}, chosen(record, CONFIG), job_type)

    @property
    def active(self) -> bool:
        """Whether there is a run of wandb."""
        return self._run is not None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._call("finish", lambda run: run.finish(exit_code=0 if error is None else 1))
        self._run = None

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Log scalars at an optimizer step."""
        self._call("log", lambda run: run.log(dict(values), step=step))

    def validation(self, result: Mapping[str, float], step: int) -> None:
        """Log what an evaluation gave, by the names of its metrics."""
        self.log({f"{VALIDATION}{name}": value for name, value in result.items()}, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values of the run."""
        self._call("summary", lambda run: run.summary.update(dict(values)))

    def _call(self, what: str, call: Any) -> None:
        """Do it if there is a run; where wandb fails, say so and track no more."""
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # see __init__
            log.warning("wandb failed (%s: %s); the run goes on untracked", what, error)
            self._run = None


def _attempts(wandb: Any, mode: str) -> tuple[str, ...]:
    """Online, where there is a key; offline otherwise, said in the log, so that nothing asks and nothing is lost."""
    if mode == "offline":
        return ("offline",)
    try:
        key = wandb.login(prompt=False, verify=False)
    except Exception as error:  # a key that is none
        log.warning("wandb: %s", _one_line(error))
        key = False
    if not key:
        log.warning("wandb.mode=online, but there is no WANDB_API_KEY: the run is kept offline; later: wandb sync")
        return ("offline",)
    return ("online", "offline")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
