"""python -m finetune.efficiency.hosvd_worker REQUEST ANSWER: one way to the HOSVD factors, alone in a process.

Alone, because a process has one peak of memory. On a CPU it is the operating system's high-water mark of resident
memory, over what was resident when the libraries were loaded and warm: LAPACK's work spaces are in it, which torch's
allocator never sees. On CUDA it is the caching allocator's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.efficiency import machine
from finetune.efficiency.hosvd_ways import Gradients, angle, run
from finetune.store.records import write_json
from sparsegrad import Basis, save_tensors

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(request: Mapping[str, Any]) -> tuple[dict[str, Any], Basis]:
    """Run one way and say what it took.

    Args:
        request: ``way``, ``shape``, ``gradients``, ``rank``, ``noise``, ``seed``, ``device``, ``threads``.

    Returns:
        ``seconds`` by part and their ``total``, ``cpu_seconds``, ``peak_bytes``, ``measured_by``, ``angle_to_planted``
        (radians, of U and of V); and the leading ``rank`` rows of the factors.

    Raises:
        ValueError: if the device is missing, or the system does not say how much memory a process took.
    """
    device = machine.find_device(request["device"])
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    options = {name: request[name] for name in ("noise", "seed")} | {"device": device}
    run(request["way"], Gradients((6, 4), 2, **options), 3)  # libraries loaded, kernels and handles made
    gradients = Gradients(tuple(request["shape"]), request["rank"], **options)
    before = _start(device)
    basis, seconds = run(request["way"], gradients, request["gradients"])
    peak = _peak(device) - before
    leading, planted = basis.leading(request["rank"], request["rank"]), gradients.planted()
    cpu_seconds = seconds.pop("cpu")
    answer = {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "cpu_seconds": cpu_seconds,
        "peak_bytes": max(0, peak),
        "measured_by": _measured_by(device),
        "angle_to_planted": {"U": angle(leading.U, planted.U), "V": angle(leading.V, planted.V)},
    }
    return answer, leading


def main(arguments: list[str]) -> None:
    """Read a request, write ``ANSWER`` (JSON) and beside it ``.safetensors`` with the leading rows ``U`` and ``V``.

    Raises:
        SystemExit: with one line, if the request is refused or a package is missing.
    """
    source, answer = (Path(argument) for argument in arguments)
    try:
        asked = json.loads(source.read_text())
        found, basis = measure(asked)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    save_tensors(answer.with_suffix(".safetensors"), {"U": basis.U, "V": basis.V}, {"way": asked["way"]})
    write_json(answer, found)


def _start(device: torch.device) -> int:
    """Forget the peak so far; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        RESET.write_text("5")  # VmHWM falls to what is resident now
    except OSError as error:
        raise ValueError(
            f"{RESET} can't be written ({error}): a CPU's peak memory is measured on Linux alone."
        ) from None
    return _status("VmHWM")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _measured_by(device: torch.device) -> str:
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated of a process of its own"
    return "VmHWM of a process of its own, over what was resident before"


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} names no {name}: peak memory is measured on Linux or CUDA.")


if __name__ == "__main__":
    main(sys.argv[1:])
