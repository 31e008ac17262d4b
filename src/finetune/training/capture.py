"""Calls on batches of many shapes, captured in CUDA graphs and replayed.

What needs a device is :class:`CUDARecorder` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

MODES = ("auto", "off")
KEEP = 32  # graphs: two a length up to 128 tokens, which is 16 lengths

Batch = dict[str, Tensor]


class Recorder(Protocol):
    """Turns a call into something that can be repeated without Python."""

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """The call's work as a function that repeats it, and the call's result, which every repeat fills anew."""
        ...

    def recover(self) -> None:
        """Make the device usable again after a recording that failed."""
        ...


class CUDARecorder:
    """CUDA graphs of one device, in one memory pool.

    Graphs of a pool use the same memory one after the other; what a call returned stays, as long as it is held.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture a call, which runs nothing; see :class:`Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Weights that autocast has cast before belong to the passes before; those that it casts now to the graph.
        torch.clear_autocast_cache()
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(torch.cuda.current_stream()),  # a capture that fails leaves its own stream behind
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                result = call()
        finally:
            torch.clear_autocast_cache()
        return graph.replay, result

    def recover(self) -> None:
        """After a failed capture torch's allocator and generator may believe that it is still going on.

        The generator's state is that of all graphs of the process, so no other one could be replayed. Up to torch 2.12
        the end of a capture alone puts it right, so a small one is made.
        """
        torch.cuda.synchronize(self._device)
        with suppress(RuntimeError):  # the allocator knows of no capture: torch has ended it
            torch._C._cuda_endAllocateToPool(self._device, self._pool)
            torch._C._cuda_releasePool(self._device, self._pool)
        with torch.cuda.device(self._device):
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                torch.zeros(1, device="cuda")
            torch.cuda.empty_cache()


@dataclass
class Held:
    """A captured call: the tensors that it reads, what repeats it, and the tensors that this fills."""

    inputs: Batch
    replay: Callable[[], None]
    result: Any


class Graphs:
    """Calls on batches of many shapes: captured when a shape is new, and replayed.

    Args:
        device: nothing is ever captured on one that is not CUDA's.
        mode: ``auto`` or ``off``.
        keep: graphs held at most; the least recently used are dropped.
        recorder: in the place of CUDA's.

    Attributes:
        active: whether calls are captured.

    Raises:
        ValueError: on an unknown mode.
    """

    def __init__(
        self, device: torch.device, mode: str = "auto", *, keep: int = KEEP, recorder: Recorder | None = None
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"graphs={mode!r}; allowed: {', '.join(MODES)}.")
        if keep < 2:
            raise ValueError(f"keep={keep}; allowed: 2 or more, one for passes and one for steps.")
        if mode == "auto" and recorder is None and device.type == "cuda":
            recorder = CUDARecorder(device)
        self.device, self._keep = device, keep
        self._recorder = recorder if mode == "auto" else None
        self.active = self._recorder is not None
        self._warm: set[Any] = set()
        self._held: dict[Any, Held] = {}  # the least recently used first
        self._places: tuple[int, ...] = ()

    def run(
        self,
        key: tuple[Any, ...],
        batch: Mapping[str, Tensor],
        call: Callable[[Batch], Any],
        *,
        warm_up: Callable[[Batch], Any] | None = None,
        capture: Callable[[Batch], Any] | None = None,
        eager: bool = False,
    ) -> tuple[Any, bool]:
        """The result of a call, and whether it was replayed; then the next one of the same key overwrites it.

        Args:
            key: what besides the shapes of the batch tells calls apart.
            batch: on any device; the call gets it on this one.
            call: does everything on the device, and waits for nothing, where it is to be captured.
            warm_up: does the same work, and leaves all as it was but the random generators, which are put back. None:
                the first call of a key is eager instead.
            capture: is captured in the place of ``call``.
            eager: not from a graph, nor captured.
        """
        key = (*key, *((name, tensor.shape, tensor.dtype) for name, tensor in batch.items()))
        held = None if eager else self._held.pop(key, None)
        if held is None and self.active and not eager and (warm_up is not None or key in self._warm):
            held = self._capture(batch, capture or call, None if key in self._warm else warm_up)
        self._warm.add(key)
        if held is None:
            return call(self.placed(batch)), False
        self._held[key] = held
        for name, tensor in held.inputs.items():
            tensor.copy_(batch[name])
        held.replay()
        return held.result, True

    def placed(self, batch: Mapping[str, Tensor]) -> Batch:
        """The batch on the device."""
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def forget(self) -> None:
        """Drop all graphs: tensors that they use have been replaced."""
        self._warm.clear()
        self._held.clear()

    def follow(self, model: nn.Module) -> None:
        """Drop all graphs if a parameter or buffer of the model lies elsewhere than at the latest call."""
        places = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers())) if self.active else ()
        if places != self._places:
            self.forget()
            self._places = places

    def give_up(self, reason: str) -> None:
        """Capture nothing from now on."""
        if self.active:
            self.active = False
            self.forget()
            log.warning("no CUDA graphs from here on, steps are eager and slower: %s", reason)

    def _capture(
        self, batch: Mapping[str, Tensor], call: Callable[[Batch], Any], warm_up: Callable[[Batch], Any] | None
    ) -> Held | None:
        assert self._recorder is not None  # active
        while len(self._held) >= self._keep:
            del self._held[next(iter(self._held))]
        inputs = {name: tensor.to(self.device, copy=True) for name, tensor in batch.items()}
        try:
            if warm_up is not None:
                with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                    warm_up(inputs)
            return Held(inputs, *self._recorder.record(lambda: call(inputs)))
        except Exception as error:  # an error of the call itself comes again, since it is repeated
            reason = _reason(error)
        self.give_up(reason)
        self._recorder.recover()
        return None


def _reason(error: BaseException) -> str:
    """The first line of the error that came first: that a capture is broken comes after it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
