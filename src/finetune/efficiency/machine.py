"""The device that is measured: its clock, what else runs on it, how much memory is free."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

OWN_CONTEXT = 700e6  # bytes of a CUDA context and its libraries, which mem_get_info counts as used and torch does not
OTHERS = 500e6  # bytes of other processes above which a device is refused
BUSY = 0.5  # load average, in runnable processes a CPU core, above which a warning is recorded


def find_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device.

    Raises:
        ValueError: on ``cuda`` without a CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=auto or device=cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def others(device: torch.device) -> dict[str, float]:
    """What else runs: ``other_bytes`` on a CUDA device, ``load_average`` (1 minute) of a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"other_bytes": max(0.0, total - free - torch.cuda.memory_reserved(device) - OWN_CONTEXT)}
    return {"load_average": os.getloadavg()[0]}


def check_alone(device: torch.device, found: dict[str, float]) -> list[str]:
    """Refuse a CUDA device that others use; warn of a busy CPU.

    Args:
        found: :func:`others`, before anything was measured.

    Returns:
        At most one warning, for the record.

    Raises:
        ValueError: if other processes hold more than 500 MB of a CUDA device.
    """
    if found.get("other_bytes", 0) > OTHERS:
        raise ValueError(
            f"other processes hold {found['other_bytes'] / 1e6:.0f} MB of {torch.cuda.get_device_name(device)}: times "
            "taken beside them mean nothing; wait, or choose another device with CUDA_VISIBLE_DEVICES."
        )
    load, limit = found.get("load_average", 0), BUSY * (os.cpu_count() or 1)
    if load > limit:
        return [f"load average {load:.1f} on {os.cpu_count()} cores before measuring: other processes ran beside it"]
    return []


def facts(device: torch.device) -> dict[str, Any]:
    """Type, name and threads of the device, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "type": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else None,
    }


def _processor() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # accelerate needs it

    return psutil.virtual_memory().available


def seconds_of(
    calls: Iterable[Callable[[], None]], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Run the calls one after the other and return the seconds of each: CUDA events, or a clock for a CPU.

    Python's garbage collector waits until all are done.

    Args:
        clock: of a CPU; ``time.process_time`` counts what the process ran, over all its threads.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return _by_events(calls, device) if device.type == "cuda" else _by_clock(calls, clock)
    finally:
        if collects:
            gc.enable()


def _by_clock(calls: Iterable[Callable[[], None]], clock: Callable[[], float]) -> list[float]:
    found = []
    for call in calls:
        started = clock()
        call()
        found.append(clock() - started)
    return found


def _by_events(calls: Iterable[Callable[[], None]], device: torch.device) -> list[float]:
    marks = []
    torch.cuda.synchronize(device)
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in marks]
