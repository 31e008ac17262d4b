"""What is compared: every method of the comparison and every form of SparseGrad, each ready to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune import models
from finetune.methods import Method, build_method, build_targets
from finetune.training.graphs import Passes
from finetune.training.losses import summed_loss
from sparsegrad import Basis

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
SWEEPS = 6  # over all batches at most, until they come from graphs


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        name: in records and tables.
        method: a module of :mod:`finetune.methods`.
        form, matmul, core: of SparseGrad.
        select_in, rotation: of its folded form; empty: the method's default.
    """

    name: str
    method: str
    form: str = ""
    matmul: str = "regular"
    core: str = "square"
    select_in: str = ""
    rotation: str = ""

    def content(self) -> dict[str, str]:
        """What it is, for the record; choices that are left to the method's default are not in it."""
        later = ("select_in", "rotation")  # than committed records
        return {name: value for name, value in asdict(self).items() if value or name not in later}


VARIANTS = (
    Variant("full", "full"),
    Variant("lora", "lora"),
    Variant("meprop", "meprop"),
    Variant("rotated_regular", "sparsegrad", "rotated"),
    Variant("rotated_sparse_by_dense", "sparsegrad", "rotated", "sparse_by_dense"),
    Variant("folded", "sparsegrad", "folded"),
    Variant("truncated", "sparsegrad", "truncated"),
    Variant("truncated_input", "sparsegrad", "truncated", core="input"),
)
"""In the order of the record; ``full`` is what ratios refer to."""

ON_REQUEST = (
    Variant("folded_backward", "sparsegrad", "folded", select_in="backward"),
    *(Variant(f"folded_{name}", "sparsegrad", "folded", rotation=name) for name in ("float32", "tf32", "bf16")),
)
"""Choices of the folded form, measured where they are named."""


def select_variants(names: Sequence[str] | None) -> list[Variant]:
    """The variants of these names, in the order of :data:`VARIANTS` and :data:`ON_REQUEST`; None gives the former.

    Raises:
        ValueError: on an unknown or repeated name, or none.
    """
    known = {variant.name: variant for variant in (*VARIANTS, *ON_REQUEST)}
    names = [variant.name for variant in VARIANTS] if names is None else list(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"variants={names}; allowed, each once: {', '.join(known)}.")
    return [variant for name, variant in known.items() if name in names]


def why_missing(variant: Variant, shapes: Sequence[tuple[int, int]], kept: int) -> str | None:
    """Why a variant can't be measured on these matrices; None if it can.

    Args:
        shapes: ``(out_features, in_features)`` of the target matrices.
        kept: entries kept a matrix.
    """
    outputs = max(shape[0] for shape in shapes)
    if variant.core == "input" and kept < outputs:
        return f"a core of all {outputs} outputs needs as many entries at least; {kept} are kept of a matrix this small"
    return None


@dataclass
class Trainee:
    """A variant ready to train; without an optimizer it stays as it is.

    Attributes:
        model: prepared by its method, on its device, in training mode.
        optimizer: the method's.
        passes: what runs its steps; None where something else does.
    """

    model: nn.Module
    optimizer: Optimizer | None
    passes: Passes | None = None

    @property
    def steps(self) -> Passes:
        """What runs its steps, of one that has it."""
        assert self.passes is not None
        return self.passes


@dataclass(frozen=True)
class Build:
    """How all variants of a record are built.

    Attributes:
        device: that they are made on: no weight is on another one first.
        num_labels: of a classifier.
        precision: ``fp32``, or ``bf16`` autocast; trained weights are float32.
        seed: of the weights, so that all variants start from the same.
        graphs: ``off``, or ``auto``: passes and, where they are static, steps are captured in CUDA graphs.
        checkpointing: gradient checkpointing of every block.
    """

    device: torch.device
    num_labels: int = 2
    learning_rate: float = 1e-5
    precision: str = "fp32"
    seed: int = 0
    graphs: str = "off"
    checkpointing: bool = False


def is_decoder(model: Mapping[str, Any]) -> bool:
    """Whether a model's group is a decoder's: it names a chat template."""
    return "template" in model


def make_method(
    variant: Variant, model: Mapping[str, Any], protocol: Mapping[str, Any], bases: Mapping[str, Basis]
) -> Method:
    """The variant's method, for the device that the bases lie on."""
    settings = variant.content() | {"name": variant.method}
    del settings["method"]
    device = next(iter(bases.values())).U.device.type
    return build_method(settings, model, protocol, bases=bases, one_backward_a_step=True, device=device)


def make_trainee(
    variant: Variant, model: Mapping[str, Any], protocol: Mapping[str, Any], bases: Mapping[str, Basis], build: Build
) -> Trainee:
    """Build the model with random weights and hand it to the variant's method.

    A decoder's frozen weights are stored in bfloat16 under bf16, as its runs store them, its trained ones in float32.

    Args:
        model, protocol: configuration groups; ``model.architecture`` is what is built.
        bases: :func:`random_bases`.

    Raises:
        ValueError: if the method refuses the configuration.
    """
    torch.manual_seed(build.seed)
    stored = PRECISIONS[build.precision] if is_decoder(model) else None
    plain = make_model(model, build.device, num_labels=build.num_labels, dtype=stored)
    if build.checkpointing:
        models.checkpoint_activations(plain)
    method = make_method(variant, model, protocol, bases)
    if stored is not None:
        method.targets.set_trainable(plain)
        models.store_trained(plain)
    prepared = method.prepare(plain).train()
    if stored is not None:
        models.cast_frozen(prepared, stored)
    optimizer = method.optimizer(prepared, build.learning_rate, 0.0)
    loss = partial(mean_loss, prepared, precision=build.precision)
    return Trainee(prepared, optimizer, Passes(prepared, loss, optimizer, mode=build.graphs))


def make_model(
    model: Mapping[str, Any],
    device: torch.device | str,
    *,
    num_labels: int = 2,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A sequence classifier or, of a decoder's group, a causal language model, with random weights.

    Args:
        dtype: of the weights, which are drawn in it; None: float32.

    Raises:
        ValueError: if the architecture names no ``model_type``, or one that transformers can't build.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    architecture = model["architecture"]
    if not architecture or "model_type" not in architecture:
        raise ValueError(f"model.architecture={architecture!r}; it must be a transformers configuration.")
    with torch.device(device):
        if not is_decoder(model):
            config = AutoConfig.for_model(**architecture, num_labels=num_labels)
            return AutoModelForSequenceClassification.from_config(config)
        config = AutoConfig.for_model(**architecture, use_cache=False)
        return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)


def random_bases(
    model: Mapping[str, Any], protocol: Mapping[str, Any], *, seed: int, device: torch.device
) -> dict[str, Basis]:
    """Random orthogonal bases by layer kind, float32: speed does not depend on which orthogonal matrix it is."""
    targets = build_targets("sparsegrad", model, protocol).find(make_model(model, "meta"))
    shapes = {target.kind: target.shape for target in targets}
    generator = torch.Generator(device).manual_seed(seed)

    def orthogonal(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, device=device)).Q.contiguous()

    return {kind: Basis(orthogonal(i), orthogonal(o)) for kind, (o, i) in shapes.items()}


def train_step(trainee: Trainee, batch: Mapping[str, Tensor]) -> None:
    """One optimizer step, as the training loop runs it: forward, backward, update, gradients forgotten."""
    trainee.steps.backward(batch)
    trainee.steps.step()


def settle(trainee: Trainee, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Train on until the passes of all batches come from graphs, or none does."""
    for _ in range(SWEEPS):
        before = trainee.steps.captured
        for batch in batches:
            train_step(trainee, batch)
        if trainee.steps.captured - before in (0, len(batches)):
            break


def mean_loss(model: nn.Module, batch: Mapping[str, Tensor], precision: str) -> Tensor:
    """Forward pass and the loss of the training loop, over the batch's predictions."""
    inputs, labels = {name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"]
    dtype = PRECISIONS[precision]
    with torch.autocast(labels.device.type, dtype=dtype, enabled=dtype is not None):
        logits = model(**inputs).logits
    return summed_loss(logits, labels) / (len(labels) if labels.dim() == 1 else labels[:, 1:].numel())
