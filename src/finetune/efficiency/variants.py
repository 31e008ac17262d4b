"""What is compared: every method of the comparison and every form of SparseGrad, each ready to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.methods import Method, build_method, build_targets
from finetune.training.evaluation import summed_loss
from sparsegrad import Basis

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        name: in records and tables.
        method: a module of :mod:`finetune.methods`.
        form, matmul, core: of SparseGrad.
    """

    name: str
    method: str
    form: str = ""
    matmul: str = "regular"
    core: str = "square"


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


def select_variants(names: Sequence[str] | None) -> list[Variant]:
    """The variants of these names, in the order of :data:`VARIANTS`; None gives all.

    Raises:
        ValueError: on an unknown or repeated name, or none.
    """
    known = [variant.name for variant in VARIANTS]
    names = known if names is None else list(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"variants={names}; allowed, each once: {', '.join(known)}.")
    return [variant for variant in VARIANTS if variant.name in names]


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
    """

    model: nn.Module
    optimizer: Optimizer | None


def make_method(
    variant: Variant, model: Mapping[str, Any], protocol: Mapping[str, Any], bases: Mapping[str, Basis] | None = None
) -> Method:
    """The variant's method; without bases it says what it costs and prepares nothing."""
    settings = {name: getattr(variant, name) for name in ("form", "matmul", "core")} | {"name": variant.method}
    return build_method(settings, model, protocol, bases=bases or {}, one_backward_a_step=True)


def make_trainee(
    variant: Variant,
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    bases: Mapping[str, Basis],
    *,
    num_labels: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
) -> Trainee:
    """Build the classifier with random weights and hand it to the variant's method.

    Args:
        model, protocol: configuration groups; ``model.architecture`` is what is built.
        bases: :func:`random_bases`.
        seed: of the weights, so that all variants start from the same.

    Raises:
        ValueError: if the method refuses the configuration.
    """
    torch.manual_seed(seed)
    plain = make_model(model["architecture"], num_labels, device)
    method = make_method(variant, model, protocol, bases)
    prepared = method.prepare(plain).train()
    return Trainee(prepared, method.optimizer(prepared, learning_rate, 0.0))


def make_model(architecture: Mapping[str, Any], num_labels: int, device: torch.device | str) -> nn.Module:
    """A sequence classifier with random weights, in float32.

    Raises:
        ValueError: if the architecture names no ``model_type``, or one that transformers can't build.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not architecture or "model_type" not in architecture:
        raise ValueError(f"model.architecture={architecture!r}; it must be a transformers configuration.")
    with torch.device(device):
        return AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(**architecture, num_labels=num_labels)
        )


def random_bases(
    model: Mapping[str, Any], protocol: Mapping[str, Any], *, seed: int, device: torch.device
) -> dict[str, Basis]:
    """Random orthogonal bases by layer kind, float32: speed does not depend on which orthogonal matrix it is."""
    targets = build_targets("sparsegrad", model, protocol).find(make_model(model["architecture"], 2, "meta"))
    shapes = {target.kind: target.shape for target in targets}
    generator = torch.Generator(device).manual_seed(seed)

    def orthogonal(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, device=device)).Q.contiguous()

    return {kind: Basis(orthogonal(i), orthogonal(o)) for kind, (o, i) in shapes.items()}


def train_step(trainee: Trainee, batch: Mapping[str, Tensor], precision: str) -> None:
    """One optimizer step, in the order of the training loop: forward, backward, update, gradients forgotten."""
    mean_loss(trainee.model, batch, precision).backward()
    trainee.optimizer.step()
    trainee.optimizer.zero_grad()


def mean_loss(model: nn.Module, batch: Mapping[str, Tensor], precision: str) -> Tensor:
    """Forward pass and the loss of the training loop, over the batch's predictions."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    dtype, device = PRECISIONS[precision], batch["labels"].device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        logits = model(**inputs).logits
    return summed_loss(logits, batch["labels"]) / len(batch["labels"])
