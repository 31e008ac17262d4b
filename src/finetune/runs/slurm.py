"""A job as one of SLURM's, by submitit. Its process imports this module, and then what the job needs.

What a job reads and writes lies in folders that its node sees too, below the folder that it was submitted from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

GRACE = 120.0
"""Seconds after a deadline in which a job that runs writes its checkpoint and ends."""


class SlurmSlot:
    """The place of one job at a time in SLURM's queue.

    Args:
        options: of submitit's executor, by SLURM's names: ``partition``, ``time`` (minutes), ``gpus_per_node``,
            ``cpus_per_task``, ``mem``, ``account``, ...
        folder: for scripts, pickles and logs.
        threads: CPU threads of torch for a job; None leaves torch's choice.
        deadline: ``time.time()`` after which what has not begun is taken back; None: it waits.

    Raises:
        ValueError: if there is no SLURM, or an option is none of submitit's.
    """

    def __init__(
        self, options: Mapping[str, Any], folder: Path, threads: int | None, deadline: float | None = None
    ) -> None:
        import submitit

        try:
            self._executor = submitit.SlurmExecutor(folder)
            self._executor.update_parameters(**{"job_name": "finetune", **options})
        except RuntimeError as error:
            raise ValueError(f"workers: executor=slurm, but {error}") from None
        self._threads, self._deadline, self._job = threads, deadline, None

    def call(self, job: Callable[[], Any]) -> Any:
        """Submit a job and wait for what it returns.

        Raises:
            BrokenProcessPool: if it ended without a result: killed, cancelled, or requeued too often.
            OutOfTime: if it was not done a while after the time was over: then it never began.
            Exception: what it raises.
        """
        from submitit.core.utils import FailedJobError, UncompletedJobError

        from finetune.training.loop import OutOfTime

        self._job = self._executor.submit(_Job(job, self._threads))
        while not self._job.done():
            if self._deadline is not None and time.time() > self._deadline + GRACE:
                self.kill()
                raise OutOfTime(f"SLURM's job {self._job.job_id} was still queued")
            time.sleep(1)
        try:
            found = self._job.result()
        except (UncompletedJobError, FailedJobError) as error:
            found = error
        if isinstance(found, UncompletedJobError | FailedJobError):
            log.warning("SLURM's job %s ended without a result: %s", self._job.job_id, found)
            raise BrokenProcessPool(str(found))
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self) -> None:
        """Take the job back."""
        if self._job is not None:
            self._job.cancel(check=False)

    def close(self) -> None:
        """Nothing is held between jobs."""


class _Job:
    """What SLURM's process calls. When its time there is over, or another job needs the place, it is queued again."""

    def __init__(self, job: Callable[[], Any], threads: int | None) -> None:
        self._job, self._threads = job, threads

    def __call__(self) -> Any:
        """The job's result, or its error: submitit would give its text alone."""
        try:
            if self._threads is not None:
                import torch

                torch.set_num_threads(self._threads)
            return self._job()
        except Exception as error:
            return error

    def checkpoint(self) -> Any:
        """What is queued again: the same, it goes on from its files."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
