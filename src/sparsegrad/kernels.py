"""Selection on a CUDA device without a wait for it: the largest entries of many rows at once.

:mod:`sparsegrad.radix` holds the kernels. What varies in length stays on the device, so that a CUDA graph can hold the
selection.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_BINS, _NEAR, _LARGEST_GROUP = 256 * 256, 8, 64


def available(device: torch.device | str) -> bool:
    """Whether :func:`radix_top_k` runs there: on CUDA, where Triton is installed."""
    return torch.device(device).type == "cuda" and find_spec("triton") is not None


def selects(G: Tensor) -> bool:
    """Whether :func:`radix_top_k` selects from a gradient like this one."""
    return G.dtype != torch.float64 and available(G.device)


def radix_top_k(G: Tensor, k: int, *, block: int = 8192, chunk: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """The k entries of largest absolute value of each row, ties to the lowest index.

    G is read once, and then the little of it that may be kept. Beside it 768 KiB a row and a sixteenth of its bytes
    are held.

    Args:
        G: ``(L, n)``, float32, contiguous, on CUDA; n below 2^31.
        k: entries to keep of each row, 1 to n. Fast where they are few: up to n / 16.
        block: entries that one program reads, a power of two, 64 to 262,144.
        chunk: entries that one program looks at at once later on, a power of two.

    Returns:
        Their indices, int64 ``(L, k)``, ascending in each row; their values, float32 ``(L, k)``; whether all of G is
        finite, bool scalar on the device: where it is False the indices mean nothing, though they are in range.

    Raises:
        ValueError: if G or k is anything else.
    """
    if G.dtype != torch.float32 or G.dim() != 2 or not G.is_contiguous():
        raise ValueError(f"G: {G.dtype} {tuple(G.shape)}, strides {G.stride()}; expected contiguous float32 (L, n).")
    (L, n), device = G.shape, G.device
    if not 1 <= k <= n < 2**31:
        raise ValueError(f"k={k}, n={n}; allowed: 1 <= k <= n < 2**31.")
    radix: Any = import_module("sparsegrad.radix")  # needs Triton

    group = _NEAR
    while 4 * group * k <= n and group < _LARGEST_GROUP:  # of larger groups more than half would reach the bound
        group *= 2
    blocks = -(-n // block)
    zeros = torch.zeros(3 * L * _BINS + 1, dtype=torch.int32, device=device)
    counts, bad = zeros[:-1].view(3, L * _BINS), zeros[-1]
    state = torch.empty(3, L, 3, dtype=torch.int32, device=device)
    near = torch.empty(L * blocks * (block // _NEAR), dtype=torch.int16, device=device)
    sizes = torch.empty(L * blocks, dtype=torch.int32, device=device)
    kept = torch.empty(L * blocks, 2, dtype=torch.int32, device=device)
    indices = torch.empty(L, k, dtype=torch.int64, device=device)
    values = torch.empty(L, k, dtype=torch.float32, device=device)
    every, rows, tile = (blocks, L), (L,), {"BLOCK": block, "CHUNK": chunk, "num_warps": 4}
    with torch.cuda.device_of(G):
        radix.read_maxima[every](G, counts[0], near, bad, n, BLOCK=block, GROUP=group, num_warps=8)
        radix.narrow[rows](counts[0], state, L, k, LEVEL=0, num_warps=32)
        radix.list_near[every](near, state[0], sizes, NUMBER=block // _NEAR, num_warps=4)
        radix.count_listed[every](G, near, sizes, counts[1], state[0], n, LEVEL=1, **tile)
        radix.narrow[rows](counts[1], state, L, k, LEVEL=1, num_warps=32)
        radix.count_listed[every](G, near, sizes, counts[2], state[1], n, LEVEL=2, **tile)
        radix.narrow[rows](counts[2], state, L, k, LEVEL=2, num_warps=32)
        radix.count_kept[every](G, near, sizes, state[2], kept, n, **tile)
        radix.sum_blocks[rows](kept, blocks, CHUNK=1024, num_warps=4)
        radix.write_kept[every](G, near, sizes, state[2], kept, indices, values, n, k, **tile)
    return indices, values, bad == 0
