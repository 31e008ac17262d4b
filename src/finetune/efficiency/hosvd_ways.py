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
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.efficiency import machine
from finetune.store.records import write_json
from sparsegrad import Basis, GradientMoments, hosvd, hosvd_of_unfoldings, hosvd_tensorly, save_tensors

Shape = tuple[int, int]

WAYS = ("streaming", "unfoldings", "unfoldings_float32", "tensorly")
REFERENCE = "streaming"
"""What subspaces and ratios of the other ways refer to."""

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEASURED_BY = {
    "cuda": "torch.cuda.max_memory_allocated of a process of its own",
    "cpu": "VmHWM of a process of its own, over what was resident before",
}
# Bytes an entry of the stack. The float32 stack; in float64 its cast, an unfolding (the other is a view), LAPACK's copy
# and right factor, and what TensorLy holds besides.
ENTRY_BYTES = {"unfoldings": 4 + 4 * 8, "unfoldings_float32": 3 * 4, "tensorly": 4 + 5 * 8}


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

    @cached_property
    def planted(self) -> Basis:
        """The shared subspaces: ``V`` ``(rank, out_features)`` and ``U`` ``(rank, in_features)``, float32."""
        generator = torch.Generator().manual_seed(self.seed)
        sides = (torch.randn(size, self.rank, generator=generator, dtype=torch.float64) for size in self.shape)
        V, U = (torch.linalg.qr(side).Q.T.float().contiguous().to(self.device) for side in sides)
        return Basis(U, V)

    def gradient(self, number: int) -> Tensor:
        """Gradient ``number`` (from 0), float32 ``(out_features, in_features)``."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + number + 1)
        decay = torch.logspace(0, -0.5, self.rank, device=self.device)
        S = torch.randn(self.rank, self.rank, generator=generator, device=self.device) * decay[:, None] * decay
        G = torch.randn(self.shape, generator=generator, device=self.device).mul_(self.noise)
        return G.addmm_(self.planted.V.T, S @ self.planted.U)


def run(way: str, gradients: Gradients, n: int) -> tuple[Basis, dict[str, float]]:
    """Find the factors of the first n gradients.

    Returns:
        The basis; seconds of ``updates`` (streaming: all moments) and ``factors`` by the clock, and ``cpu``: those that
        the process ran for both, over all threads, whatever other processes took. Making gradients and writing them
        into a stack is not counted.

    Raises:
        ImportError: if tensorly is asked for and not installed.
    """
    seconds: dict[str, float] = defaultdict(float)
    timed = partial(_timed, seconds, gradients.device)
    if way == "streaming":
        moments = GradientMoments(*gradients.shape, device=gradients.device)
        for number in range(n):
            G = gradients.gradient(number)
            with timed("updates"):
                moments.update(G)
            del G
        with timed("factors"):
            basis = hosvd(moments)
    elif way == "unfoldings_float32":
        basis = Basis(*(_float32(gradients, n, transposed, timed) for transposed in (True, False)))
    else:
        stack = torch.empty(n, *gradients.shape, device=gradients.device)
        for number in range(n):
            stack[number] = gradients.gradient(number)
        with timed("factors"):
            basis = hosvd_of_unfoldings(stack) if way == "unfoldings" else hosvd_tensorly(stack)
    return basis, dict(seconds)


def flop(way: str, shape: Shape, n: int) -> dict[str, float]:
    """Floating-point operations by formula, under the names of :func:`run`'s seconds."""
    o, i = shape
    moments = 2.0 * n * o * i * (o + i)
    if way == "streaming":
        return {"updates": moments, "factors": 9.0 * (o**3 + i**3)}
    total = sum(6.0 * m * m * M + 12.0 * m**3 for m, M in (sorted((o, n * i)), sorted((i, n * o))))
    return {"factors": total + (moments if way == "tensorly" else 0)}  # TensorLy multiplies the core out too


def peak_bytes(way: str, shape: Shape, n: int) -> int:
    """Most bytes at once by formula, gradients included."""
    o, i = shape
    widest = max(o, i)
    if way == "streaming":
        return 8 * (o * o + i * i) + max(17 * o * i, 8 * 4 * widest**2)
    unit = 4 if way == "unfoldings_float32" else 8
    return ENTRY_BYTES[way] * n * o * i + 8 * unit * min(widest, n * min(o, i)) ** 2


def angle(found: Tensor, reference: Tensor) -> float:
    """Largest principal angle, in radians, between the spaces of two sets of orthonormal rows ``(r, features)``."""
    P, Q = found.double(), reference.double()
    # By the sine: the cosine of an angle below 1e-8 is 1.
    return float(torch.linalg.svdvals(P - (P @ Q.T) @ Q)[0].clamp(max=1.0).asin())


def _float32(
    gradients: Gradients, n: int, transposed: bool, timed: Callable[[str], AbstractContextManager[None]]
) -> Tensor:
    """U (of the transposed gradients) or V, by the SVD of one unfolding, which is freed before the next one is made."""
    rows, columns = reversed(gradients.shape) if transposed else gradients.shape
    unfolding = torch.empty(rows, n * columns, device=gradients.device)
    for number, part in enumerate(unfolding.split(columns, dim=1)):
        G = gradients.gradient(number)
        part.copy_(G.T if transposed else G)
        del G
    with timed("factors"):
        left = torch.linalg.svd(unfolding, full_matrices=False).U
    return left.T.contiguous()


@contextmanager
def _timed(seconds: dict[str, float], device: torch.device, part: str) -> Iterator[None]:
    """Add a block's seconds by the clock to ``part``, those of the process on the CPU to ``cpu``."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    started, cpu = time.perf_counter(), time.process_time()
    yield
    wait()
    seconds[part] += time.perf_counter() - started
    seconds["cpu"] += time.process_time() - cpu


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
    before = _peak(device, reset=True)
    basis, seconds = run(request["way"], gradients, request["gradients"])
    peak = max(0, _peak(device) - before)
    leading, planted = basis.leading(request["rank"], request["rank"]), gradients.planted
    cpu_seconds = seconds.pop("cpu")
    answer = {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "measured_by": MEASURED_BY[device.type],
        "angle_to_planted": {"U": angle(leading.U, planted.U), "V": angle(leading.V, planted.V)},
    }
    return answer, leading


def _peak(device: torch.device, *, reset: bool = False) -> int:
    """Most bytes so far, or, where the peak so far is forgotten, those in use now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            RESET.write_text("5")
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[0])
    except (OSError, IndexError) as error:
        raise ValueError(f"{STATUS} tells no VmHWM ({error}): peak memory is measured on Linux or CUDA.") from None


def main(request: str, answer: str) -> None:
    """Write ``answer`` (JSON) and beside it ``.safetensors`` with the leading rows ``U`` and ``V``.

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


if __name__ == "__main__":
    main(*sys.argv[1:])
