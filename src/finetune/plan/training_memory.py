"""Memory of fine-tuning a decoder on one device, by component, calculated: nothing is allocated.

The model is built on the meta device and prepared by its method, so that what counts as trained is what a run trains.
Bytes of a matrix ``(o, i)``, o rows and i columns, of which a method keeps k entries a step:

    parameters        trained 4 (float32), frozen 2 (bfloat16) or 4, for each number
    gradients         4 for each trained number: dense until the step, since the sum over micro-batches is selected;
                      with one backward pass a step SparseGrad keeps k indices (int64) and values instead, 12 k
    optimizer state   AdamW: 8 for each trained number. Lazy Adam: 16 for each entry touched so far (int64 index, two
                      float32 moments): 16 k after the first step, at most 16 o i
    bases             4 (o^2 + i^2) for each layer kind, shared by its blocks
    activations       see :mod:`finetune.plan.activations`
    selection         one matrix at a time. SparseGrad: G_rot and V G, then absolute values and two masks beside G_rot,
                      10 o i; MeProp: absolute values and two masks, 6 o i
    folding back      when all gradients are freed: the rows of U and V that hold one of the k entries (r and c of them
                      at most), the entries as a block, its product with one of the bases: 4 (r c + r o + c i + the
                      smaller product)
    snapshot          4 for each trained number, and the bases once more, while the best weights go to the CPU

The peak is parameters + optimizer state + bases + the largest of: gradients and activations; gradients and selection;
folding back; snapshot. With one backward pass a step selection happens beside the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.methods import MeProp, Method, SparseGrad, build_method
from finetune.models import cast_frozen
from finetune.plan import activations
from sparsegrad import Basis, sparsegrad_layers, sparsify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shape = tuple[int, int]


@dataclass(frozen=True)
class Setup:
    """How a cell trains, as far as memory depends on it.

    Attributes:
        micro_batch: rows of a forward pass.
        tokens: of a row.
        accumulation_steps: micro-batches of an optimizer step.
        precision: ``fp32``, or ``bf16`` autocast.
        frozen_dtype: storage of what is not trained, ``fp32`` or ``bf16``.
        checkpointing: gradient checkpointing of every block.
        touched: share of a matrix that lazy Adam has touched in the end; at least k entries count.

    Raises:
        ValueError: if a value is out of range.
    """

    micro_batch: int
    tokens: int
    accumulation_steps: int = 1
    precision: str = "fp32"
    frozen_dtype: str = "fp32"
    checkpointing: bool = False
    touched: float = 1.0

    def __post_init__(self) -> None:
        for name in ("micro_batch", "tokens", "accumulation_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; it must be a whole number, at least 1.")
        for name in ("precision", "frozen_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(DTYPES)}.")
        if not 0 < self.touched <= 1:
            raise ValueError(f"touched={self.touched!r}; it is a share of the entries, above 0 and at most 1.")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes while one method trains; see the module.

    Attributes:
        trained: numbers that the method trains, of a selected matrix the kept ones.
        optimizer_state_first: after the first step; ``optimizer_state``: with the touched share of :class:`Setup`.
        saved_activations: what one forward pass saves without checkpointing.
        activations: the most of one micro-batch that is there at once, with the logits.
        selects_in_backward: whether a gradient is selected in the backward pass.
    """

    trained: int
    parameters: int
    gradients: int
    optimizer_state_first: int
    optimizer_state: int
    bases: int
    saved_activations: int
    activations: int
    selection: int
    folding: int
    snapshot: int
    selects_in_backward: bool

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        backward = self.gradients + self.activations + (self.selection if self.selects_in_backward else 0)
        step = self.gradients + self.selection
        return self.parameters + self.optimizer_state + self.bases + max(backward, step, self.folding, self.snapshot)


def training_memory(
    method: Mapping[str, Any], model: Mapping[str, Any], protocol: Mapping[str, Any], setup: Setup
) -> TrainingMemory:
    """Memory of one method's training.

    Args:
        method, model, protocol: the configuration groups; ``model.architecture`` is what is built.
        setup: sizes and precisions.

    Raises:
        ValueError: on a configuration that the method refuses, or SparseGrad's rotated form.
    """
    once = setup.accumulation_steps == 1
    if method.get("form") == "truncated":
        return _truncated(method, model, protocol, setup)
    chosen = build_method(method, model, protocol, bases={}, one_backward_a_step=once)
    plain = meta_model(model["architecture"])
    targets = [(target.kind, tuple(target.module.weight.shape)) for target in chosen.targets.find(plain)]
    prepared = _prepare(plain, chosen)
    trained = sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in prepared.parameters() if not p.requires_grad)

    rotates = isinstance(chosen, SparseGrad)
    lazy = rotates or (isinstance(chosen, MeProp) and chosen.optimizer_rule == "lazy_adam")
    selected = [shape for _, shape in targets] if rotates or isinstance(chosen, MeProp) else []
    kept = [chosen.entries(shape) for shape in selected]
    entries = [o * i for o, i in selected]
    touched = [max(k, round(setup.touched * n)) for k, n in zip(kept, entries, strict=True)]
    around = trained - sum(entries)
    in_backward = once and rotates
    bases = sum(4 * (o * o + i * i) for o, i in dict(targets).values()) if rotates else 0
    frozen_dtype = DTYPES[setup.frozen_dtype]
    found = activations.measure(
        prepared, setup.micro_batch, setup.tokens, precision=setup.precision, frozen_dtype=frozen_dtype
    )
    return TrainingMemory(
        trained=around + sum(kept),
        parameters=4 * trained + frozen_dtype.itemsize * frozen,
        gradients=4 * around + (12 * sum(kept) if in_backward else 4 * sum(entries)),
        optimizer_state_first=8 * around + (16 * sum(kept) if lazy else 8 * sum(entries)),
        optimizer_state=8 * around + (16 * sum(touched) if lazy else 8 * sum(entries)),
        bases=bases,
        saved_activations=found.saved,
        activations=found.peak(setup.checkpointing),
        selection=max(entries, default=0) * (10 if rotates else 6),
        folding=max((_folding(k, shape) for k, shape in zip(kept, selected, strict=True)), default=0) if rotates else 0,
        snapshot=4 * trained + bases,
        selects_in_backward=in_backward,
    )


def _truncated(
    method: Mapping[str, Any], model: Mapping[str, Any], protocol: Mapping[str, Any], setup: Setup
) -> TrainingMemory:
    """Memory of the truncated form, whose trained numbers have ordinary gradients and AdamW's moments."""
    plain = meta_model(model["architecture"])
    chosen = build_method(method, model, protocol, bases={})
    shapes = {t.kind: tuple(t.module.weight.shape) for t in chosen.targets.find(plain)}
    with torch.device("meta"):
        bases = {kind: Basis(torch.empty(i, i), torch.empty(o, o)) for kind, (o, i) in shapes.items()}
    prepared = build_method(method, model, protocol, bases=bases).prepare(plain)
    frozen_dtype = DTYPES[setup.frozen_dtype]
    cast_frozen(prepared, frozen_dtype)
    trained = sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in prepared.parameters() if not p.requires_grad)
    shared = {id(layer.basis): layer.basis for layer in sparsegrad_layers(prepared).values()}
    held = sum(4 * factor.numel() for basis in shared.values() for factor in (basis.U, basis.V))
    in_place = sum(m.weight.numel() for m in sparsegrad_layers(prepared).values() if m.update == "in_place")
    found = activations.measure(
        prepared, setup.micro_batch, setup.tokens, precision=setup.precision, frozen_dtype=frozen_dtype
    )
    return TrainingMemory(
        trained=trained,
        parameters=4 * trained + frozen_dtype.itemsize * frozen,
        gradients=4 * trained,
        optimizer_state_first=8 * trained,
        optimizer_state=8 * trained,
        bases=held,
        saved_activations=found.saved,
        activations=found.peak(setup.checkpointing),
        selection=0,
        folding=0,
        snapshot=4 * (trained + in_place) + held,
        selects_in_backward=False,
    )


def meta_model(architecture: Mapping[str, Any]) -> nn.Module:
    """A causal language model without weights.

    Args:
        architecture: arguments of a transformers configuration, ``model_type`` among them.

    Raises:
        ValueError: if there is none.
    """
    if not architecture or "model_type" not in architecture:
        raise ValueError(f"model.architecture={architecture!r}; memory is calculated from an architecture: give one.")
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))


def _prepare(model: nn.Module, method: Method) -> nn.Module:
    """The method's own ``prepare``; SparseGrad without its bases, whose values nobody has yet."""
    if not isinstance(method, SparseGrad):
        return method.prepare(model)
    if method.form != "folded":
        raise ValueError(f"method.form={method.form!r}; memory is calculated for form=folded only.")
    targets = method.targets.set_trainable(model)
    k = {target.kind: method.entries(tuple(target.module.weight.shape)) for target in targets}
    modules, layers = method.targets.target_modules, method.targets.layers_to_transform
    return sparsify(model, None, k, modules, layers, select_in=method.select_in)


def _folding(k: int, shape: Shape) -> int:
    o, i = shape
    rows, columns = min(k, o), min(k, i)
    return 4 * (rows * columns + rows * o + columns * i + min(rows * i, columns * o))
