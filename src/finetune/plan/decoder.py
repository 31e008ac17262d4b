"""What a decoder's cells need, before anything runs: memory against a card's, disk, judge calls.

All is calculated from configuration; bytes throughout, 1 GB is 1e9. Of a projection ``(o, i)``, n the larger of both:

    preliminary phase   the target matrices in float32 and the rest in the storage precision (with
                        preliminary.update all in float32, and all gradients and AdamW's moments); one gradient at a
                        time and its float64 copy, 12 o i; float64 moments of every kind, 8 (o^2 + i^2); activations
                        as in training
    HOSVD               one projection at a time: its moments, the factor that is done, and for the other one five
                        float64 matrices, 5 x 8 n^2: the symmetric input and the eigenvectors, beside them syevd's
                        workspace of two, then three copies while rows are put in order and signs fixed
    disk                merged checkpoints, all weights in the precision of the frozen ones; moments float64, bases
                        float32; checkpoints of a run: two and a third being written, each with the trained weights,
                        the best ones, and the optimizer's state
    judge calls         questions x turns x seeds x repeats for each method
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from finetune.methods import build_targets, needs_bases, with_own_choices
from finetune.models import cast_frozen
from finetune.plan import activations
from finetune.plan.memory import DTYPES, Setup, TrainingMemory, meta_model, training_memory
from sparsegrad import Target

CHECKPOINTS = 3
EIGH = 5  # n x n matrices of float64 at most in sparsegrad.hosvd's decomposition of one moment


@dataclass(frozen=True)
class Card:
    """The accelerator that a cell must fit.

    Attributes:
        name: for the reader.
        memory: bytes.
        reserve: bytes of it that the calculation leaves free: CUDA context, libraries' workspaces, gradients of
            activations, fragmentation.
    """

    name: str
    memory: float
    reserve: float

    def fits(self, needed: float) -> bool:
        """Whether so many bytes fit beside the reserve."""
        return needed + self.reserve <= self.memory


def plan_model(
    model: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    protocol: Mapping[str, Any],
    scale: Mapping[str, Any],
    *,
    seeds: int,
    questions: int,
    turns: int,
    touched: float,
    card: Card,
    compared: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything that one model's cells need; JSON values.

    Args:
        model, protocol, scale: the configuration groups of a decoder.
        methods: name to configuration group.
        seeds: number of report seeds.
        questions, turns: of the judged question set.
        touched: see :class:`finetune.plan.memory.Setup`.
        card: what the cells must fit.
        compared: methods that no cell runs, whose memory stands beside.

    Raises:
        ValueError: on a configuration that a run would refuse.
    """
    setup = setup_of(protocol, scale, touched)
    plain = meta_model(model["architecture"], causal=True)
    total = sum(parameter.numel() for parameter in plain.parameters())

    def memory_of(method: Mapping[str, Any]) -> TrainingMemory:
        own = with_own_choices({"method": method, "protocol": protocol})["protocol"]
        return training_memory(method, model, own, setup, meta_model(model["architecture"], causal=True))

    training = {name: memory_of(method) for name, method in methods.items()}
    found: dict[str, Any] = {"parameters": total, "setup": asdict(setup), "training": {}}
    beside, found["not_compared"] = {}, {}
    for name, method in (compared or {}).items():
        try:
            beside[name] = memory_of(method)
        except ValueError as error:  # a core of all outputs, on matrices that keep fewer entries
            found["not_compared"][name] = str(error)
    for name, memory in (training | beside).items():
        fits = {"peak": memory.peak, "fits": card.fits(memory.peak), "share": memory.trained / total}
        found["training"][name] = asdict(memory) | fits
    shapes: dict[str, tuple[int, int]] = {}
    if any(needs_bases(method) for method in methods.values()):
        targets = build_targets("sparsegrad", model, protocol).find(plain)
        shapes = {target.kind: target.shape for target in targets}
        preliminary = _preliminary(plain, targets, protocol["preliminary"], setup)
        for name, needed in (("preliminary", preliminary), ("hosvd", _hosvd(shapes))):
            found[name] = needed | {"fits": card.fits(needed["peak"])}
    found["host"] = {"loading": 4 * total}
    found["disk"] = _disk(total * DTYPES[setup.frozen_dtype].itemsize, training, seeds, shapes)
    repeats = scale["judging"]["repeats"]
    calls = questions * turns * seeds * repeats
    found["judging"] = {"per_method": calls, "calls": calls * len(methods), "repeats": repeats}
    return found


def setup_of(protocol: Mapping[str, Any], scale: Mapping[str, Any], touched: float) -> Setup:
    """The sizes that a run on one device takes from its configuration groups."""
    batch = scale["batch_size"] or protocol["batch_size"]
    micro_batch = min(scale["micro_batch_size"], batch)
    return Setup(
        micro_batch=micro_batch,
        tokens=scale["max_length"] or protocol["max_length"],
        accumulation_steps=-(-batch // micro_batch),
        precision=scale["precision"] or protocol["precision"],
        frozen_dtype=scale["frozen_dtype"],
        checkpointing=scale["gradient_checkpointing"],
        touched=touched,
    )


def _moments(shape: tuple[int, int]) -> int:
    return 8 * (shape[0] ** 2 + shape[1] ** 2)


def _preliminary(
    plain: nn.Module, targets: Sequence[Target], preliminary: Mapping[str, Any], setup: Setup
) -> dict[str, int]:
    total = sum(parameter.numel() for parameter in plain.parameters())
    shapes = {target.kind: target.shape for target in targets}
    plain.requires_grad_(preliminary["update"])
    for target in targets:
        target.module.weight.requires_grad_(True)
    rows = preliminary["batch_size"]
    stored = torch.float32 if preliminary["update"] else DTYPES[setup.frozen_dtype]
    cast_frozen(plain, stored)
    saved = activations.measure(plain, rows, setup.tokens, precision=setup.precision)
    stepped = 12 * total if preliminary["update"] else 0  # gradients and AdamW's moments of the whole model
    differentiated = sum(target.module.weight.numel() for target in targets)
    found = {
        "parameters": 4 * differentiated + stored.itemsize * (total - differentiated),
        "moments": sum(_moments(shape) for shape in shapes.values()),
        "gradients": max(12 * o * i for o, i in shapes.values()) + stepped,
        "activations": saved.peak(checkpointing=setup.checkpointing),
    }
    return found | {"peak": sum(found.values())}


def _hosvd(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    peaks = []
    for o, i in shapes.values():
        inside = max(EIGH * 8 * i * i, 8 * i * i + EIGH * 8 * o * o)  # first U, then V beside it
        peaks.append((_moments((o, i)) + inside, inside, _moments((o, i))))
    peak, inside, moments = max(peaks)
    return {"moments": moments, "decomposition": inside, "peak": peak}


def _disk(
    weights: int, training: Mapping[str, TrainingMemory], seeds: int, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Checkpoints of a run are deleted when it ends, so the largest method's count once."""
    largest = max((2 * memory.snapshot + memory.optimizer_state for memory in training.values()), default=0)
    moments = sum(_moments(shape) for shape in shapes.values())
    found = {
        "merged": weights * len(training) * seeds,
        "moments": moments,
        "bases": moments // 2,
        "checkpoints": CHECKPOINTS * largest,
    }
    return found | {"total": sum(found.values())}


def lines(name: str, found: Mapping[str, Any], card: Card) -> list[str]:
    """One model's plan for a reader, in GB."""
    setup, methods = found["setup"], found["training"]
    batch = f"{setup['accumulation_steps']} x {setup['micro_batch']} x {setup['tokens']} tokens"
    kind = "with" if setup["checkpointing"] else "without"
    rows = [["", *methods]]
    rows += [[title, *(_gb(memory[key]) for memory in methods.values())] for key, title in _COMPONENTS.items()]
    rows.append([f"fits {card.name}", *("yes" if memory["fits"] else "NO" for memory in methods.values())])
    rows.append(["trainable", *(f"{100 * memory['share']:.3f} %" for memory in methods.values())])
    text = [
        f"{name}: {found['parameters']:,} parameters; {batch} a step, {setup['precision']}, frozen weights in "
        f"{setup['frozen_dtype']}, {kind} gradient checkpointing",
        f"{card.name}: {_gb(card.memory)} GB, {_gb(card.reserve)} of them kept free. Training, GB:",
        *_aligned(rows),
        "The largest of gradients + activations, gradients + selection, folding back and snapshot is in the peak.",
        *_lazy(setup["touched"], methods),
        *(f"{method} is not calculated: {reason}" for method, reason in found["not_compared"].items()),
    ]
    for key, title in (("preliminary", "Preliminary phase"), ("hosvd", "HOSVD, largest projection")):
        if key in found:
            text.append(f"{title}, GB: {_listed(found[key])}: {'fits' if found[key]['fits'] else 'does NOT fit'}")
    judging = found["judging"]
    return [
        *text,
        f"Main memory while a checkpoint loads: {_gb(found['host']['loading'])} GB",
        f"Disk, GB: {_listed(found['disk'])}",
        f"Judge calls: {judging['calls']:,} ({judging['per_method']:,} a method, {judging['repeats']} repeats)",
    ]


_COMPONENTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "bases": "bases",
    "activations": "activations",
    "selection": "selection",
    "folding": "folding back",
    "snapshot": "snapshot",
    "peak": "peak",
}


def _lazy(touched: float, methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the optimizer state of methods with lazy Adam stands for, if there are any."""
    first, end = "optimizer_state_first", "optimizer_state"
    listed = [f"{name} {_gb(memory[first])}" for name, memory in methods.items() if memory[first] != memory[end]]
    if not listed:
        return []
    return [f"Lazy Adam's state: {100 * touched:.0f} % of the entries touched; after one step: {', '.join(listed)}"]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_gb(value)}" for key, value in values.items() if not isinstance(value, bool))


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
