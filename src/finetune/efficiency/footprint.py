"""Memory of one variant: counted by component, measured at its peak by the allocator.

On CUDA the peak is the caching allocator's, over what was allocated before the variant was built; on a CPU it is the
running sum of the profiler's memory record, from before the model is built to the end. Scratch memory that a library
takes without torch's allocator is in neither. A graph's memory is allocated while it is captured and held from then on:
with graphs, the peak includes the capture, and ``reserved`` says what is held.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.efficiency.timing import release
from finetune.efficiency.variants import Build, Trainee, mean_loss, settle, train_step
from finetune.training import memory
from sparsegrad import Basis, RotatedLinear, SparseGradLinear

TRAINING, EVALUATION = "finetune.training.loop", "finetune.training.evaluation"


def measure_memory(
    make: Callable[[], Trainee], batch: Mapping[str, Tensor], build: Build, *, warmup_steps: int
) -> tuple[dict[str, Any], Trainee]:
    """Build a variant, train and evaluate one batch, and say what memory that took, over what was there before.

    Args:
        make: builds the variant.
        batch: on the device.
        build: how it is built.
        warmup_steps: optimizer steps before the one that is measured; at least one is made, so that there is a state.

    Returns:
        In bytes: ``components`` (``parameters``, ``gradients`` after the backward pass, ``optimizer_state``, ``bases``,
        ``buffers``, ``saved_activations``, and under autocast ``weight_copies``, its bfloat16 copies),
        ``peak_training`` of a whole step, and ``peak_evaluation`` of a forward pass without gradients with the
        optimizer's state in memory, as the authors measured (D21); on CUDA ``reserved`` too, what the caching allocator
        holds for it. And the variant.
    """
    run = _on_cuda if build.device.type == "cuda" else _on_cpu
    release(build.device)
    found = run(make, batch, build, max(1, warmup_steps))
    release(build.device)
    return found


def take_workspaces(make: Callable[[], Trainee], batch: Mapping[str, Tensor], device: torch.device) -> None:
    """Train one step of a throw-away model on CUDA.

    cuBLAS keeps its workspaces from a thread's first product on, and they would count as a variant's memory.
    """
    if device.type == "cuda":
        train_step(make(), batch)
        release(device)


def _on_cuda(
    make: Callable[[], Trainee], batch: Mapping[str, Tensor], build: Build, warmup: int
) -> tuple[dict[str, Any], Trainee]:
    device, peaks = build.device, dict[str, int]()
    before, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    trainee = make()
    notes = _first_step(trainee, batch, build.precision)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup - 1):
        train_step(trainee, batch)
    if build.graphs != "off":
        settle(trainee, [batch])
    evaluate = partial(_evaluate, precision=build.precision)
    for name, call in (("peak_training", train_step), ("peak_evaluation", evaluate)):
        torch.cuda.synchronize(device)
        if call is evaluate or not trainee.steps.captured:
            torch.cuda.reset_peak_memory_stats(device)
        call(trainee, batch)
        torch.cuda.synchronize(device)
        peaks[name] = torch.cuda.max_memory_allocated(device) - before
    return {
        "components": _components(trainee, notes, build.precision),
        **peaks,
        "reserved": torch.cuda.memory_reserved(device) - reserved,
        "measured_by": "torch.cuda.max_memory_allocated",
    }, trainee


def _on_cpu(
    make: Callable[[], Trainee], batch: Mapping[str, Tensor], build: Build, warmup: int
) -> tuple[dict[str, Any], Trainee]:
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainee = make()
        notes = _first_step(trainee, batch, build.precision)
        for _ in range(warmup - 1):
            train_step(trainee, batch)
        with record_function(TRAINING):
            train_step(trainee, batch)
        with record_function(EVALUATION):
            _evaluate(trainee, batch, build.precision)
        components = _components(trainee, notes, build.precision)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        peaks = peaks_in_trace(json.loads(path.read_text())["traceEvents"], (TRAINING, EVALUATION))
    return {
        "components": components,
        "peak_training": peaks[TRAINING],
        "peak_evaluation": peaks[EVALUATION],
        "measured_by": "torch.profiler, running sum of allocations",
    }, trainee


def peaks_in_trace(events: list[dict[str, Any]], spans: tuple[str, ...]) -> dict[str, int]:
    """Most bytes allocated at once within each span of a profiler's trace.

    Args:
        events: ``traceEvents``; memory events are named ``[memory]`` and hold ``Bytes``, negative where freed.
        spans: names of ``record_function`` blocks.

    Raises:
        ValueError: if a span is not in the trace.
    """
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    found = {}
    for span in spans:
        blocks = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == span and e.get("ph") == "X"]
        if not blocks:
            raise ValueError(f"the trace has no block {span!r}; profile with ProfilerActivity.CPU.")
        start, end = blocks[0]
        total = sum(change for time, change in changes if time < start)
        highest = total
        for time, change in changes:
            if start <= time <= end:
                total += change
                highest = max(highest, total)
        found[span] = int(highest)
    return found


def _first_step(trainee: Trainee, batch: Mapping[str, Tensor], precision: str) -> dict[str, int | None]:
    """Train one step, not from a graph, for the optimizer's state; count gradients and saved activations."""
    notes: dict[str, int | None] = {}
    with memory.saved_activations(trainee.model, notes, True):
        loss = mean_loss(trainee.model, batch, precision)
    loss.backward()
    notes["gradients"] = memory.gradient_bytes(trainee.model)
    assert trainee.optimizer is not None  # every variant has one
    trainee.optimizer.step()
    trainee.optimizer.zero_grad()
    return notes


@torch.no_grad()
def _evaluate(trainee: Trainee, batch: Mapping[str, Tensor], precision: str) -> None:
    trainee.model.eval()
    mean_loss(trainee.model, batch, precision)
    trainee.model.train()


def _components(trainee: Trainee, notes: Mapping[str, int | None], precision: str) -> dict[str, int | None]:
    in_bases = {id(t) for m in trainee.model.modules() if isinstance(m, Basis) for t in m.buffers()}
    buffers = memory.tensor_bytes(t for t in trainee.model.buffers() if id(t) not in in_bases)
    copies = {"weight_copies": _weight_copies(trainee.model)} if precision == "bf16" else {}
    return {**memory.components(trainee.model, trainee.optimizer), "buffers": buffers, **notes, **copies}


def _weight_copies(model: nn.Module) -> int:
    """Bytes of the bfloat16 weights that autocast keeps until a pass ends: those of trained linear layers."""
    kinds = (nn.Linear, SparseGradLinear)
    layers = [m for m in model.modules() if isinstance(m, kinds) and not isinstance(m, RotatedLinear)]
    return 2 * sum(layer.weight.numel() for layer in layers if layer.weight.requires_grad)
