"""Independent jobs, one after the other or side by side in processes of their own.

A fork server imports the heavy modules once, so that a further worker costs a fork (measured on two cores: 5.6 s until
the first result, while joblib's fresh processes took 10.4 s).
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
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm

from finetune.config.launch import processes

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
        devices: CUDA devices as ``CUDA_VISIBLE_DEVICES`` names them, shared out in turn; empty without any.
    """

    count: int = 1
    threads: int | None = None
    devices: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Workers:
        """What ``workers``, ``threads`` and ``device`` of a configuration ask for.

        Raises:
            ValueError: if several workers are asked for, and several processes run as one.
        """
        wanted, cores = config.get("workers", 1), len(os.sched_getaffinity(0))
        cuda = config["device"] != "cpu" and torch.cuda.is_available()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = tuple(visible.split(",")) if cuda else ()
        alone = processes()[1] == 1
        if wanted == "auto":
            wanted = (len(devices) or cores) if alone else 1
        if wanted > 1 and not alone:
            raise ValueError(f"workers={wanted}, but accelerate launch or torchrun started this run: use workers=1.")
        shared = max(1, cores // wanted) if wanted > 1 else None
        return cls(wanted, config["threads"] or shared, devices)


def run_all(
    jobs: Sequence[Callable[[], Any]],
    workers: Workers,
    *,
    label: str = "",
    bar: bool = False,
    names: Sequence[str] | None = None,
) -> list[Any]:
    """Call every job; returns what they return, in their order.

    Args:
        jobs: each does not depend on the others; for several workers they, and what they return, can be pickled.
        workers: how many at a time.
        label, bar: of the progress bar, and whether there is one.
        names: of the jobs, for errors.

    Raises:
        ValueError: if a worker's process died; its job alone is lost, all others are done first.
        Exception: the first that a job raises; jobs that did not begin are dropped.
    """
    if workers.threads is not None:
        torch.set_num_threads(workers.threads)
    with tqdm(total=len(jobs), desc=label, disable=not bar or not jobs) as progress:
        if workers.count > 1 and len(jobs) > 1:
            return _run_side_by_side(jobs, workers, progress, names or [f"job {n + 1}" for n in range(len(jobs))])
        results = []
        for job in jobs:
            results.append(job())
            progress.update()
        return results


def _run_side_by_side(
    jobs: Sequence[Callable[[], Any]], workers: Workers, progress: tqdm, names: Sequence[str]
) -> list[Any]:
    count, died = min(workers.count, len(jobs)), []
    devices = workers.devices or (None,)
    slots: SimpleQueue[_Slot] = SimpleQueue()
    for number in range(count):
        slots.put(_Slot(workers.threads, devices[number % len(devices)]))
    try:
        with ThreadPoolExecutor(count) as threads:
            futures = {threads.submit(_call, slots, job): name for job, name in zip(jobs, names, strict=True)}
            try:
                for future in as_completed(futures):
                    if isinstance(future.exception(), BrokenProcessPool):
                        died.append(futures[future])
                    else:
                        future.result()
                    progress.update()
            except BaseException as error:
                threads.shutdown(wait=False, cancel_futures=True)
                while not isinstance(error, Exception) and not all(future.done() for future in futures):  # Ctrl-C
                    for process in multiprocessing.active_children():
                        process.kill()
                    time.sleep(0.05)  # one may be starting yet
                raise
    finally:
        for _ in range(count):
            slots.get().close()
    if died:
        raise ValueError(
            f"{', '.join(sorted(died))}: the worker's process died (killed, or out of memory: lower workers). "
            "The others are finished and kept: run again."
        )
    return [future.result() for future in futures]


def _call(slots: SimpleQueue[_Slot], job: Callable[[], Any]) -> Any:
    slot = slots.get()
    try:
        return slot.call(job)
    finally:
        slots.put(slot)


class _Slot:
    """Place of one worker's process. A pool of several would end them all when one dies."""

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

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None


def warm_up(workers: Workers) -> None:
    """Let the fork server import while this process reads data; nothing for one worker."""
    if workers.count > 1:
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
