"""Ways to the HOSVD factors of n gradients ``(out_features, in_features)``, each measured alone in a process.

    streaming           moments in float64, one gradient at a time, then one eigendecomposition a mode
    unfoldings          SVD of both mode unfoldings of the stack, in float64 (:func:`sparsegrad.hosvd_of_unfoldings`)
    unfoldings_float32  the same in float32, as the authors have it (``torch.svd``). Here one unfolding is filled
                        at a time and no stack is held beside it: a lower bound of the authors' memory. Their SVD of the
                        third mode, whose factor nothing reads, is left out
    tensorly            TensorLy's ``partial_tucker`` without iterations, in float64 (:func:`sparsegrad.hosvd_tensorly`)

Costs by formula, o and i the sizes of a gradient, m the smaller and M the larger side of an unfolding:

    streaming           flop 2 n o i (o + i) for the moments, 9 (o^3 + i^3) for eigh;
                        bytes 8 (o^2 + i^2) + max(gradient 17 o i, eigh 8 x 4 max(o, i)^2)
    SVD of an unfolding flop 6 m^2 M + 12 m^3: QR, its Q, the product with it (2 m^2 M each), SVD of the triangle;
                        bytes an entry: float32 3 x 4, float64 4 + 4 x 8, TensorLy 4 + 5 x 8; and 8 m^2 numbers of work

``python -m finetune.efficiency.hosvd_ways REQUEST ANSWER`` runs one way: a process has one peak of memory. On a CPU it
is the operating system's high-water mark of resident memory, over what was resident when the libraries were loaded and
warm: LAPACK's work spaces are in it, which torch's allocator never sees. On CUDA it is the caching allocator's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.efficiency import machine
from finetune.store.records import write_json
from sparsegrad import Basis, GradientMoments, hosvd, hosvd_of_unfoldings, hosvd_tensorly, save_tensors

Shape = tuple[int, int]
Seconds = dict[str, float]

WAYS = ("streaming", "unfoldings", "unfoldings_float32", "tensorly")
REFERENCE = "streaming"
"""What subspaces and ratios of the other ways refer to."""

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEASURED_BY = {
    "cuda": "torch.cuda.max_memory_allocated of a process of its own",
    "cpu": "VmHWM of a process of its own, over what was resident before",
}


@dataclass(frozen=True)
class Gradients:
    """Gradients of one layer kind: a shared leading subspace of known rank, and noise.

    Made one at a time, each from its own seed, so that a way that streams never holds two.

    Attributes:
        shape: ``(out_features, in_features)``.
        rank: of the shared part, ``A S_t B^T`` with S_t random and A, B orthonormal.
        noise: standard deviation of an entry of the rest; entries of S_t have 1 to 0.1.
    """

    shape: Shape
    rank: int
    noise: float
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or not 1 <= self.rank <= min(self.shape):
            raise ValueError(f"rank={self.rank} of gradients of shape {self.shape}; allowed: 1 to the smaller side.")

    def planted(self) -> Basis:
        """The shared subspaces: ``V`` ``(rank, out_features)`` and ``U`` ``(rank, in_features)``, float32."""
        generator = torch.Generator().manual_seed(self.seed)
        V, U = (
            torch.linalg.qr(torch.randn(size, self.rank, generator=generator, dtype=torch.float64)).Q.T
            for size in self.shape
        )
        return Basis(U.float().contiguous().to(self.device), V.float().contiguous().to(self.device))

    def gradient(self, number: int, planted: Basis) -> Tensor:
        """Gradient ``number`` (from 0), float32 ``(out_features, in_features)``."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + number + 1)
        decay = torch.logspace(0, -0.5, self.rank, device=self.device)
        S = torch.randn(self.rank, self.rank, generator=generator, device=self.device) * decay[:, None] * decay
        G = torch.randn(self.shape, generator=generator, device=self.device).mul_(self.noise)
        return G.addmm_(planted.V.T, S @ planted.U)


def run(way: str, gradients: Gradients, n: int) -> tuple[Basis, Seconds]:
    """Find the factors of the first n gradients.

    Returns:
        The basis; seconds of ``updates`` (streaming: all moments) and ``factors`` by the clock, and ``cpu``: those that
        the process ran for both, over all threads, whatever other processes took. Making gradients and writing them
        into a stack is not counted.

    Raises:
        ValueError: on an unknown way.
        ImportError: if tensorly is asked for and not installed.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}; allowed: {', '.join(WAYS)}.")
    planted, device = gradients.planted(), gradients.device
    updates, factors = _Clock(device), _Clock(device)
    if way == "streaming":
        moments = GradientMoments(*gradients.shape, device=device)
        for number in range(n):
            G = gradients.gradient(number, planted)
            with updates:
                moments.update(G)
            del G
        with factors:
            basis = hosvd(moments)
        return basis, {"updates": updates.seconds, "factors": factors.seconds, "cpu": updates.cpu + factors.cpu}
    if way == "unfoldings_float32":
        basis = Basis(*(_float32(gradients, n, planted, transposed, factors) for transposed in (True, False)))
    else:
        stack = torch.empty(n, *gradients.shape, device=device)
        for number in range(n):
            stack[number] = gradients.gradient(number, planted)
        with factors:
            basis = hosvd_of_unfoldings(stack) if way == "unfoldings" else hosvd_tensorly(stack)
    return basis, {"factors": factors.seconds, "cpu": factors.cpu}


def flop(way: str, shape: Shape, n: int) -> dict[str, float]:
    """Floating-point operations by formula, under the names of :func:`run`'s seconds."""
    o, i = shape
    if way == "streaming":
        return {"updates": 2.0 * n * o * i * (o + i), "factors": 9.0 * (o**3 + i**3)}
    total = sum(6.0 * m * m * M + 12.0 * m**3 for m, M in (sorted((o, n * i)), sorted((i, n * o))))
    if way == "tensorly":  # it multiplies the core out too
        total += 2.0 * n * o * i * (o + i)
    return {"factors": total}


def peak_bytes(way: str, shape: Shape, n: int) -> int:
    """Most bytes at once by formula, gradients included."""
    o, i = shape
    entries, widest = n * o * i, max(o, i)
    if way == "streaming":
        return 8 * (o * o + i * i) + max(17 * o * i, 8 * 4 * widest**2)
    unit = 4 if way == "unfoldings_float32" else 8
    work = 8 * unit * min(widest, n * min(o, i)) ** 2
    if way == "unfoldings_float32":
        return 3 * unit * entries + work
    # The float32 stack; in float64 its cast, an unfolding (the other is a view), LAPACK's copy and right factor, and
    # what TensorLy holds besides.
    copies = 4 if way == "unfoldings" else 5
    return 4 * entries + copies * unit * entries + work


def angle(found: Tensor, reference: Tensor) -> float:
    """Largest principal angle, in radians, between the spaces of two sets of orthonormal rows ``(r, features)``."""
    P, Q = found.double(), reference.double()
    # By the sine: the cosine of an angle below 1e-8 is 1.
    return float(torch.linalg.svdvals(P - (P @ Q.T) @ Q)[0].clamp(max=1.0).asin())


def _float32(gradients: Gradients, n: int, planted: Basis, transposed: bool, clock: _Clock) -> Tensor:
    """U (of the transposed gradients) or V, by the SVD of one unfolding, which is freed before the next one is made."""
    rows, columns = reversed(gradients.shape) if transposed else gradients.shape
    unfolding = torch.empty(rows, n * columns, device=gradients.device)
    for number in range(n):
        G = gradients.gradient(number, planted)
        unfolding[:, number * columns : (number + 1) * columns] = G.T if transposed else G
        del G
    with clock:
        left = torch.linalg.svd(unfolding, full_matrices=False).U
    return left.T.contiguous()


class _Clock:
    """Seconds by the clock, and those of the process on the CPU, of all blocks that it was entered for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.cpu = device, 0.0, 0.0

    def __enter__(self) -> None:
        self._wait()
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._started
        self.cpu += time.process_time() - self._cpu

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


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
    options: dict[str, Any] = {name: request[name] for name in ("noise", "seed")} | {"device": device}
    run(request["way"], Gradients((6, 4), 2, **options), 3)  # libraries loaded, kernels and handles made
    gradients = Gradients(tuple(request["shape"]), request["rank"], **options)
    before = _start(device)
    basis, seconds = run(request["way"], gradients, request["gradients"])
    peak = max(0, _peak(device) - before)
    leading, planted = basis.leading(request["rank"], request["rank"]), gradients.planted()
    cpu_seconds = seconds.pop("cpu")
    answer = {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "measured_by": MEASURED_BY[device.type],
        "angle_to_planted": {"U": angle(leading.U, planted.U), "V": angle(leading.V, planted.V)},
    }
    return answer, leading


def main(request: str, answer: str) -> None:
    """Write ``answer`` (JSON) and beside it ``.safetensors`` with the leading rows ``U`` and ``V``.

    Args:
        request: of :func:`measure`, as JSON.

    Raises:
        SystemExit: with one line, if the request is refused or a package is missing.
    """
    asked, path = json.loads(request), Path(answer)
    try:
        found, basis = measure(asked)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    save_tensors(path.with_suffix(".safetensors"), {"U": basis.U, "V": basis.V}, {"way": asked["way"]})
    write_json(path, found)


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


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} names no {name}: peak memory is measured on Linux or CUDA.")


if __name__ == "__main__":
    main(*sys.argv[1:])
