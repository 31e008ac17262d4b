"""Jobs, one after the other or side by side in processes of their own, here or on a cluster.

Here a fork server imports the heavy modules once, so that a further worker costs a fork (measured on two cores: 5.6 s
until the first result, while joblib's fresh processes took 10.4 s). submitit's local executor is not used: it starts
all jobs at once, each in fresh processes that import for longer than a short run takes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.config.launch import processes
from finetune.runs.slurm import SlurmSlot

_PRELOADED = (
    "__main__", "finetune.runs.cells", "finetune.runs.search", "peft", "scipy.stats", "sklearn.metrics",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
    "transformers.models.roberta.modeling_roberta",
)  # fmt: skip


@dataclass(frozen=True)
class Workers:
    """How many jobs run at a time, and on what.

    Attributes:
        count: processes; 1 stays in this one.
        threads: CPU threads of torch for each; None leaves torch's choice.
        devices: CUDA devices as ``CUDA_VISIBLE_DEVICES`` names them, shared out in turn; empty without any. More
            processes than devices share them.
        slurm: options of submitit's executor, where each job is one of SLURM; None: jobs run here.
        folder: for SLURM's scripts, pickles and logs.
        deadline: ``time.time()`` after which what SLURM has not begun is taken back.
    """

    count: int = 1
    threads: int | None = None
    devices: tuple[str, ...] = ()
    slurm: Mapping[str, Any] | None = None
    folder: Path = Path("outputs/slurm")
    deadline: float | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Workers:
        """What ``workers``, ``threads`` and ``device`` of a configuration ask for.

        Raises:
            ValueError: if several workers are asked for, and several processes run as one.
        """
        wanted, cores = config.get("workers", 1), len(os.sched_getaffinity(0))
        slurm, folder = None, Path(config.get("checkpoints", cls.folder)) / "slurm"
        if isinstance(wanted, Mapping):
            slurm = wanted.get("slurm", {}) if wanted["executor"] == "slurm" else None
            wanted = wanted["count"]
        cuda = config["device"] != "cpu" and torch.cuda.is_available()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = tuple(visible.split(",")) if cuda else ()
        alone = processes()[1] == 1
        if wanted == "auto":
            wanted = (len(devices) or cores) if alone else 1
        if (wanted > 1 or slurm is not None) and not alone:
            raise ValueError(f"workers={wanted}, but accelerate launch or torchrun started this run: use workers=1.")
        if slurm is not None:
            return cls(wanted, config["threads"], (), slurm, folder)
        shared = max(1, cores // wanted) if wanted > 1 else None
        return cls(wanted, config["threads"] or shared, devices)

    @property
    def leave(self) -> bool:
        """Whether jobs leave this process."""
        return self.count > 1 or self.slurm is not None

    def slots(self, jobs: int) -> list[_Slot] | list[SlurmSlot]:
        """Places for so many jobs."""
        count = min(self.count, jobs)
        if self.slurm is not None:
            return [SlurmSlot(self.slurm, self.folder, self.threads, self.deadline) for _ in range(count)]
        devices = self.devices or (None,)
        return [_Slot(self.threads, devices[number % len(devices)]) for number in range(count)]


def run_all(
    jobs: Sequence[Callable[[], Any]],
    workers: Workers,
    *,
    label: str = "",
    bar: bool = False,
    names: Sequence[str] | None = None,
    after: Sequence[int | None] | None = None,
    note: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Call every job; returns what they return, in their order.

    Args:
        jobs: each does not depend on the others, unless ``after`` says so; for several workers they, and what they
            return, can be pickled.
        workers: how many at a time.
        label, bar: of the progress bar, and whether there is one.
        names: of the jobs, for errors.
        after: number of the job, an earlier one, whose end each waits for; None: it waits for none.
        note: called in this process with the number of a job and what it returned, as soon as it has.

    Raises:
        ValueError: if a worker's process died; its job alone is lost, all others are done first.
        Exception: the first that a job raises; jobs that did not begin are dropped.
    """
    if workers.threads is not None:
        torch.set_num_threads(workers.threads)
    names = names or [f"job {number + 1}" for number in range(len(jobs))]
    with tqdm(total=len(jobs), desc=label, disable=not bar or not jobs) as progress:
        line = _Line(jobs, names, after or [None] * len(jobs), note or _ignore, progress)
        if not workers.leave or (workers.slurm is None and len(jobs) < 2):
            line.work(_Here())
        else:
            _run_side_by_side(line, workers)
    line.check()
    return line.results


def _ignore(*_: Any) -> None:
    pass


class _Line:
    """Jobs that are taken in their order, and what came of them. One that waits for another is passed over."""

    def __init__(
        self,
        jobs: Sequence[Callable[[], Any]],
        names: Sequence[str],
        after: Sequence[int | None],
        note: Callable[[int, Any], None],
        progress: tqdm,
    ) -> None:
        self.results: list[Any] = [None] * len(jobs)
        self._jobs, self._names, self._after, self._note, self._progress = jobs, names, after, note, progress
        self._left, self._ended, self._died = list(range(len(jobs))), set[int](), list[str]()
        self._changed = threading.Condition()

    def work(self, slot: _Here | _Slot | SlurmSlot) -> None:
        """Take jobs and call them, until none is left, or one raises an error: then no other begins."""
        while (number := self._take()) is not None:
            try:
                found = slot.call(self._jobs[number])
            except BrokenProcessPool:
                self._end(number, died=True)
            except BaseException:
                self.close()
                raise
            else:
                self._end(number, found)

    def close(self) -> None:
        """Let no other job begin."""
        with self._changed:
            self._left.clear()
            self._changed.notify_all()

    def check(self) -> None:
        """Tell of jobs whose process died.

        Raises:
            ValueError: if there are any.
        """
        if self._died:
            raise ValueError(
                f"{', '.join(sorted(self._died))}: the worker's process died (killed, or out of memory: lower "
                "workers). The others are finished and kept: run again."
            )

    def _take(self) -> int | None:
        with self._changed:
            while self._left:
                ready = (n for n in self._left if self._after[n] is None or self._after[n] in self._ended)
                if (number := next(ready, None)) is not None:
                    self._left.remove(number)
                    return number
                self._changed.wait()
            return None

    def _end(self, number: int, found: Any = None, *, died: bool = False) -> None:
        with self._changed:
            if died:
                self._died.append(self._names[number])
            else:
                self.results[number] = found
                self._note(number, found)
            self._ended.add(number)
            self._progress.update()
            self._changed.notify_all()


def _run_side_by_side(line: _Line, workers: Workers) -> None:
    slots = workers.slots(len(line.results))
    try:
        with ThreadPoolExecutor(len(slots)) as threads:
            futures = [threads.submit(line.work, slot) for slot in slots]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException as error:
                line.close()
                while not isinstance(error, Exception) and not all(future.done() for future in futures):  # Ctrl-C
                    for slot in slots:
                        slot.kill()
                    time.sleep(0.05)  # one may be starting yet
                raise
    finally:
        for slot in slots:
            slot.close()


class _Here:
    """The place of one worker that is this process."""

    def call(self, job: Callable[[], Any]) -> Any:
        return job()


class _Slot:
    """The place of one worker's process. A pool of several would end them all when one dies."""

    def __init__(self, threads: int | None, device: str | None) -> None:
        self._given = threads, device
        self._executor: ProcessPoolExecutor | None = None

    def call(self, job: Callable[[], Any]) -> Any:
        """Call a job in the process; BrokenProcessPool if it dies, and the next job gets another process."""
        if self._executor is None:
            self._executor = ProcessPoolExecutor(1, mp_context=_context(), initializer=_start, initargs=self._given)
        try:
            return self._executor.submit(job).result()
        except BrokenProcessPool:
            self.close()
            raise

    def kill(self) -> None:
        """End whatever runs, in all places."""
        for process in multiprocessing.active_children():
            process.kill()

    def close(self) -> None:
        """Let the process end."""
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None


def warm_up(workers: Workers) -> None:
    """Let the fork server import while this process reads data; nothing for one worker."""
    if workers.count > 1 and workers.slurm is None:
        from multiprocessing import forkserver

        _context()
        forkserver.ensure_running()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _start(threads: int | None, device: str | None) -> None:
    """In a worker, before its first job: its threads and its CUDA device, and that it ends when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to tell
    if threads is not None:
        torch.set_num_threads(threads)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device


def _end_with_parent() -> None:
    """An orphan would train on while a rerun begins the same run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
