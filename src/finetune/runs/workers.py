"""Independent jobs, one after the other or side by side in processes of their own.

A fork server imports the heavy modules once, so that a further worker costs a fork (measured on two cores: 5.6 s until
the first result, while joblib's fresh processes took 10.4 s).
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
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


def run_all(jobs: Sequence[Callable[[], Any]], workers: Workers, *, label: str = "", bar: bool = False) -> list[Any]:
    """Call every job; returns what they return, in their order.

    Args:
        jobs: each does not depend on the others; for several workers they, and what they return, can be pickled.
        workers: how many at a time.
        label, bar: of the progress bar, and whether there is one.

    Raises:
        ValueError: if a worker's process died.
        Exception: the first that a job raises; jobs that did not begin are dropped.
    """
    if workers.threads is not None:
        torch.set_num_threads(workers.threads)
    progress = tqdm(total=len(jobs), desc=label, disable=not bar or not jobs)
    with progress:
        if workers.count == 1 or len(jobs) < 2:
            results = []
            for job in jobs:
                results.append(job())
                progress.update()
            return results
        with _executor(min(workers.count, len(jobs)), workers) as executor:
            futures = [executor.submit(job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.update()
            except BrokenProcessPool:
                raise ValueError(
                    "a worker's process died (killed, or out of memory); what is finished is kept: run again."
                ) from None
            finally:
                executor.shutdown(cancel_futures=True)
            return [future.result() for future in futures]


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


def _executor(count: int, workers: Workers) -> ProcessPoolExecutor:
    context = _context()
    started = (workers.threads, workers.devices, context.Value("i", 0))
    return ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=started)


def _start(threads: int | None, devices: Sequence[str], number: Any) -> None:
    """In a worker, before its first job: its threads and its CUDA device, and that it ends when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    if devices:
        with number.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(number.value) % len(devices)]
            number.value += 1


def _end_with_parent() -> None:
    """An orphan would train on while a rerun begins the same run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
