"""Memory by component, in bytes, counted from the tensors themselves; the allocator's peak where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsegrad import Basis, CompactGradient, SparseGradAdamW


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def components(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of parameters, optimizer state and HOSVD bases."""
    bases = [tensor for module in model.modules() if isinstance(module, Basis) for tensor in module.buffers()]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.dim() > 0]
    moments = optimizer.moment_bytes() if isinstance(optimizer, SparseGradAdamW) else 0
    return {
        "parameters": tensor_bytes(model.parameters()),
        "optimizer_state": tensor_bytes(state) + moments,
        "bases": tensor_bytes(bases),
    }


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that are held right now, of SparseGrad's the selected entries."""
    held = [p.grad for p in model.parameters() if p.grad is not None]
    return tensor_bytes(t for g in held for t in ((g.places, g.entries) if isinstance(g, CompactGradient) else (g,)))


class Saved:
    """What autograd keeps in place of a saved tensor: it dies with its node of the graph, and can be watched."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def storages(self) -> list[torch.UntypedStorage]:
        """Of the tensor; of a sparse one, which has none, those of its indices and values."""
        tensor = self.tensor.detach()
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        return [part.untyped_storage() for part in parts]


@contextmanager
def saved_activations(model: nn.Module, notes: dict[str, int | None], active: bool) -> Iterator[None]:
    """Count what a forward pass leaves saved for the backward pass into ``saved_activations``.

    Parameters and buffers are left out, and so is what was saved for a result that nobody kept.
    """
    if not active:
        yield
        return
    saved: WeakSet[Saved] = WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved.add(held := Saved(tensor))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {storage.data_ptr(): storage.nbytes() for held in saved for storage in held.storages()}
    found = sum(size for pointer, size in storages.items() if pointer not in own)
    notes["saved_activations"] = max(notes.get("saved_activations") or 0, found)


def reset_peak(device: torch.device) -> None:
    """Start a new peak on a CUDA device; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """The allocator's peak since :func:`reset_peak`; None where torch counts none (CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def device_name(device: torch.device) -> dict[str, Any]:
    """Type and name of a device for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {"type": device.type, "name": name}
