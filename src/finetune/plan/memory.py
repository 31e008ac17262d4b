"""Memory of fine-tuning on one device, by component, calculated: nothing is allocated.

The model is built on the meta device and prepared by its method, so that what counts as trained is what a run trains.

    parameters        trained 4 (float32), frozen 2 (bfloat16) or 4, for each number
    gradients         of target matrices as the method says, else 4 for each trained number
    optimizer state   of target matrices as the method says, else AdamW's: 8 for each trained number
    bases             as the prepared layers hold them, shared by the blocks of a kind
    activations       see :mod:`finetune.plan.activations`
    selection, folding back   as the method says, one matrix at a time
    snapshot          what a checkpoint holds of the model, while the best weights go to the CPU

The peak is parameters + optimizer state + bases + the largest of: gradients and activations; gradients and selection;
folding back, when all gradients are freed; snapshot. Where a gradient is selected in the backward pass, selection
happens beside the activations. Of the preliminary phase and the HOSVD, n the larger side of a projection ``(o, i)``:

    preliminary phase   the target matrices in float32 and the rest in the storage precision (with
                        preliminary.update all in float32, and all gradients and AdamW's moments); one gradient at a
                        time and its float64 copy, 12 o i; float64 moments of every kind, 8 (o^2 + i^2); activations
    HOSVD               one projection at a time: its moments, the factor that is done, and for the other one five
                        float64 matrices, 5 x 8 n^2: the symmetric input and the eigenvectors, beside them syevd's
                        workspace of two, then three copies while rows are put in order and signs fixed

Gradients of activations are left to the card's reserve; the peak of a single step,
which holds them, is :func:`finetune.methods.costs.predicted_peaks`, as the efficiency stage compares it with the
allocator's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from finetune.methods import build_method
from finetune.methods.base import count_parameters
from finetune.methods.costs import of_a_step, predicted_peaks
from finetune.models import cast_frozen
from finetune.plan import activations
from sparsegrad import Basis, Target, sparsegrad_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EIGH = 5  # n x n matrices of float64 at most in sparsegrad.hosvd's decomposition of one moment


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
        logits_chunk: tokens whose logits are held at a time; None: all.

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
    logits_chunk: int | None = None


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes while one method trains; see the module.

    Attributes:
        trained: numbers that the method trains, of a selected matrix the kept ones.
        optimizer_state_first: after the first step; ``optimizer_state``: with the touched share of :class:`Setup`.
        saved_activations: what one forward pass saves without checkpointing.
        activations: the most of one micro-batch that is there at once, with the logits.
        step_peak: of a single step with gradients of activations, without checkpointing and snapshot.
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
    step_peak: int
    selects_in_backward: bool

    @property
    def peak(self) -> int:
        """The most that is there at once in a run."""
        backward = self.gradients + self.activations + (self.selection if self.selects_in_backward else 0)
        step = self.gradients + self.selection
        return self.parameters + self.optimizer_state + self.bases + max(backward, step, self.folding, self.snapshot)


def training_memory(
    method: Mapping[str, Any], model: Mapping[str, Any], protocol: Mapping[str, Any], setup: Setup, *, causal: bool
) -> TrainingMemory:
    """Memory of one method's training.

    Args:
        method, model, protocol: the configuration groups, a variant's own choices put into the protocol;
            ``model.architecture`` is what is built.
        setup: sizes and precisions.
        causal: see :func:`meta_model`.

    Raises:
        ValueError: on a configuration that the method refuses.
    """
    plain, once = meta_model(model["architecture"], causal=causal), setup.accumulation_steps == 1
    targets = build_method(method, model, protocol, bases={}, one_backward_a_step=once).targets.find(plain)
    chosen = build_method(method, model, protocol, bases=_meta_bases(targets), one_backward_a_step=once)
    shapes = [target.shape for target in targets]
    first, end = ([chosen.memory(shape, touched) for shape in shapes] for touched in (0.0, setup.touched))
    counted = count_parameters(plain, chosen)["trainable"]
    around = counted - sum(chosen.entries(shape) for shape in shapes)
    prepared, frozen_dtype = chosen.prepare(plain), DTYPES[setup.frozen_dtype]
    cast_frozen(prepared, frozen_dtype)
    trained = sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in prepared.parameters() if not p.requires_grad)
    moved = sum(layer.weight.numel() for layer in sparsegrad_layers(prepared).values() if _moves_in_place(layer))
    components = {
        "parameters": 4 * trained + frozen_dtype.itemsize * frozen,
        "gradients": 4 * around + sum(matrix.gradient for matrix in end),
        "optimizer_state": 8 * around + sum(matrix.state for matrix in end),
        "bases": _bases(prepared),
    }
    sizes = {"rows": setup.micro_batch, "tokens": setup.tokens, "precision": setup.precision}
    sizes["logits_chunk"] = setup.logits_chunk
    try:
        found = activations.measure(prepared, **sizes)
    except DataDependentOutputException:  # an adapter that looks at values as it runs: as without it
        plain = meta_model(model["architecture"], causal=causal)
        chosen.targets.set_trainable(plain)
        found = activations.measure(plain, **sizes)
    components["saved_activations"] = found.saved
    width, positions = 2 if setup.precision == "bf16" else 4, setup.micro_batch * setup.tokens
    peaks = predicted_peaks(chosen, components, shapes, positions=positions, width=width)
    selection, folding = of_a_step(chosen, shapes)
    return TrainingMemory(
        **components,
        trained=counted,
        optimizer_state_first=8 * around + sum(matrix.state for matrix in first),
        activations=found.peak(setup.checkpointing),
        selection=selection,
        folding=folding,
        snapshot=4 * (trained + moved) + components["bases"],
        step_peak=peaks["peak_training"],
        selects_in_backward=chosen.selects_in_backward,
    )


def meta_model(architecture: Mapping[str, Any], *, causal: bool) -> nn.Module:
    """A language model or a sequence classifier without weights.

    Args:
        architecture: arguments of a transformers configuration, ``model_type`` among them.
        causal: a causal language model, or a classifier of two classes.

    Raises:
        ValueError: if there is none.
    """
    if not architecture or "model_type" not in architecture:
        raise ValueError(f"model.architecture={architecture!r}; memory is calculated from an architecture: give one.")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    made = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    options: dict[str, Any] = {} if causal else {"num_labels": 2}
    with torch.device("meta"):
        return made.from_config(AutoConfig.for_model(**architecture, **options))


def preliminary_memory(
    plain: nn.Module, targets: Sequence[Target], preliminary: Mapping[str, Any], setup: Setup
) -> dict[str, int]:
    """Memory while gradients are collected: ``parameters``, ``moments``, ``gradients``, ``activations``, ``peak``.

    Args:
        plain: the model on the meta device; it holds fake tensors afterwards.
        targets: its matrices whose gradients are collected.
        preliminary: of the protocol.
        setup: of the training; rows of a batch are the preliminary phase's own.
    """
    total = sum(parameter.numel() for parameter in plain.parameters())
    shapes = {target.kind: target.shape for target in targets}
    differentiated = sum(target.weight.numel() for target in targets)
    plain.requires_grad_(preliminary["update"])
    for target in targets:
        target.weight.requires_grad_(True)
    stored = torch.float32 if preliminary["update"] else DTYPES[setup.frozen_dtype]
    cast_frozen(plain, stored)
    saved = activations.measure(plain, preliminary["batch_size"], setup.tokens, precision=setup.precision)
    stepped = 12 * total if preliminary["update"] else 0  # gradients and AdamW's moments of the whole model
    found = {
        "parameters": 4 * differentiated + stored.itemsize * (total - differentiated),
        "moments": sum(moments_bytes(shape) for shape in shapes.values()),
        "gradients": max(12 * o * i for o, i in shapes.values()) + stepped,
        "activations": saved.peak(checkpointing=setup.checkpointing),
    }
    return found | {"peak": sum(found.values())}


def hosvd_memory(shapes: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Memory of the largest projection's HOSVD: ``moments``, ``decomposition``, ``peak``."""
    peaks = []
    for o, i in shapes:
        inside = max(EIGH * 8 * i * i, 8 * i * i + EIGH * 8 * o * o)  # first U, then V beside it
        peaks.append((moments_bytes((o, i)) + inside, inside, moments_bytes((o, i))))
    peak, inside, moments = max(peaks)
    return {"moments": moments, "decomposition": inside, "peak": peak}


def moments_bytes(shape: tuple[int, int]) -> int:
    """Of both float64 moments of a layer kind; its float32 bases take half of them."""
    return 8 * (shape[0] ** 2 + shape[1] ** 2)


def _meta_bases(targets: list[Target]) -> dict[str, Basis]:
    shapes = {target.kind: target.shape for target in targets}
    with torch.device("meta"):
        return {kind: Basis(torch.empty(i, i), torch.empty(o, o)) for kind, (o, i) in shapes.items()}


def _bases(prepared: nn.Module) -> int:
    held = {id(factor): factor for m in prepared.modules() if isinstance(m, Basis) for factor in m.buffers()}
    return sum(4 * factor.numel() for factor in held.values())


def _moves_in_place(layer: nn.Module) -> bool:
    """Whether steps move a weight that has no gradient of its own, as in the truncated form above bfloat16."""
    return getattr(layer, "update", None) == "in_place"
