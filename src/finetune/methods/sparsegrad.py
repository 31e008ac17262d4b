"""SparseGrad behind the comparison's interface; the method itself is the package ``sparsegrad``.

Costs of a matrix ``(o, i)`` with k kept entries or a core of r x c; operations beyond forward and input gradient:

    folded      2 o i; once a step 2 o i (o + i) to rotate the gradient and as many at most to fold the update back;
                with selection in the backward pass each side is rotated where it is cheaper, 2 i^2 a token or 2 o i^2 a
                step, and 2 o^2 a token or 2 i o^2 a step
    rotated     2 o i + 4 (o^2 + i^2): x U^T, V, and their backward products
    truncated   2 (c i + r o + r c), and once a step the product V_r^T S U_c; with all outputs in the core 2 c (i + o),
                and once a step S U_c

Bytes: a dense gradient 4 o i until the step, or with selection in the backward pass k indices (int64) and values, 12 k;
lazy Adam 16 for each entry touched (int64 index, two float32 moments), k of them after the first step, later room for
three times k more, or k and a quarter. Of matrices that are treated together: selection 5 o i beside their gradients,
absolute values and a mask (rotating needs 4 o i); folding back 4 o i for the update in the original coordinates and as
much for half of it. The truncated form has ordinary gradients and AdamW's moments of its core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import ClassVar, Self

import torch
from torch import nn
from torch.optim import Optimizer

from finetune.methods.base import Configuration, Method, kept_entries
from finetune.methods.costs import MatrixMemory, Operations, Shape
from sparsegrad import Basis, SparseGradAdamW, core_shape, merge, param_groups, random_basis, sparsify, top_k
from sparsegrad.grouped import TOGETHER
from sparsegrad.select import Rule

CORES = ("square", "input")


@dataclass(frozen=True)
class SparseGrad(Method):
    """See :class:`finetune.methods.base.Method`.

    Attributes:
        bases: by layer kind, in the hosvd orientation.
        k: entries kept a matrix (D1); of the truncated form, entries of the core at most.
        density: a share instead of a count; wins over k.
        orientation: ``hosvd`` or ``released`` (D2); ``random`` is the control: orthogonal bases that were drawn, not
            computed.
        basis_seed: of those.
        form, matmul, select_in: see :func:`sparsegrad.sparsify`. The truncated form selects nothing: its core of at
            most k entries trains whole.
        core: of the truncated form, ``square``, or ``input``: all outputs times the leading directions of the input.
        rotation: precision of the folded form's products, see :mod:`sparsegrad.rotation`.
        drop_after: see :class:`sparsegrad.SparseGradAdamW`.
        select: which k entries are kept, see :func:`sparsegrad.sparsify`; a method's file names it by its dotted path.
    """

    needs_bases: ClassVar[bool] = True

    bases: Mapping[str, Basis]
    k: int | None
    density: float | None = None
    orientation: str = "hosvd"
    basis_seed: int | None = None
    form: str = "folded"
    matmul: str = "regular"
    core: str = "square"
    select_in: str = "step"
    drop_after: int | None = None
    select: Rule = top_k
    rotation: str = "auto"

    @classmethod
    def from_config(cls, config: Configuration) -> Self:
        method, protocol = config.method, config.protocol
        if config.bases is None:
            raise ValueError(
                f"method={method['name']} needs bases: run the gradients and basis stages, or set basis=PATH."
            )
        return cls(
            config.targets,
            bases=config.bases,
            k=config.model["k"],
            density=protocol["density"],
            orientation=protocol["orientation"],
            basis_seed=method.get("basis_seed"),
            drop_after=method.get("drop_after"),
            form=method["form"],
            matmul=method["matmul"],
            core=method.get("core", "square"),
            select_in=_select_in(method.get("select_in", "auto"), config),
            rotation=method.get("rotation", "auto"),
            select=_rule(method["select"]) if "select" in method else top_k,
        )

    @property
    def selects_in_backward(self) -> bool:
        return self.form != "truncated" and self.select_in == "backward"

    def prepare(self, model: nn.Module) -> nn.Module:
        targets = self.targets.set_trainable(model)
        k = {t.kind: kept_entries(self.k, self.density, t.shape) for t in targets}
        return sparsify(
            model,
            self._bases(),
            k,
            self.targets.target_modules,
            self.targets.layers_to_transform,
            form=self.form,
            matmul=self.matmul,
            select_in="backward" if self.selects_in_backward else "step",
            select=self.select,
            rotation=self.rotation,
        )

    def _bases(self) -> dict[str, Basis]:
        if self.core not in CORES:
            raise ValueError(f"method.core={self.core!r}; allowed: {', '.join(CORES)}.")
        bases = self._oriented()
        return {kind: basis.input_side() for kind, basis in bases.items()} if self.core == "input" else bases

    def _oriented(self) -> dict[str, Basis]:
        if self.orientation != "random":
            return {kind: basis.oriented(self.orientation) for kind, basis in self.bases.items()}
        if self.basis_seed is None:
            raise ValueError("orientation='random' draws its bases: give method.basis_seed, a whole number.")
        generator = torch.Generator().manual_seed(self.basis_seed)
        return {kind: random_basis(basis, generator) for kind, basis in self.bases.items()}

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        return SparseGradAdamW(param_groups(model, weight_decay), lr=lr, fused=True, drop_after=self.drop_after)

    def merge(self, model: nn.Module) -> nn.Module:
        return merge(model)

    def entries(self, shape: Shape) -> int:
        return prod(self._core(shape)) if self.form == "truncated" else kept_entries(self.k, self.density, shape)

    def operations(self, shape: Shape) -> Operations:
        (o, i), whole = shape, 2.0 * shape[0] * shape[1]
        if self.form == "rotated":
            return Operations(whole + 4.0 * (o * o + i * i))
        if self.form == "folded" and self.selects_in_backward:
            return Operations(whole, whole * (o + i), ((2.0 * i * i, whole * i), (2.0 * o * o, whole * o)))
        if self.form == "folded":
            return Operations(whole, 2 * whole * (o + i))
        r, c = self._core(shape)
        if self.core == "input":
            return Operations(2.0 * c * (i + o), whole * c)
        return Operations(2.0 * (c * i + r * o + r * c), 2.0 * min(o * c * (r + i), r * i * (c + o)))

    def memory(self, shape: Shape, touched: float = 0.0) -> MatrixMemory:
        if self.form == "truncated":
            return super().memory(shape, touched)
        k, whole = self.entries(shape), shape[0] * shape[1]
        held = max(k, round(touched * whole))
        room = k + max(2 * k, held // 4) if touched else 0
        return MatrixMemory(
            gradient=12 * k if self.selects_in_backward else 4 * whole,
            state=16 * (held + room),
            selection=5 * whole,
            folding=8 * whole if self.form == "folded" else 0,
            together=1 if self.selects_in_backward else max(1, TOGETHER // whole),
        )

    def backward_bytes(self, shape: Shape, positions: int, width: int) -> int:
        """Rotated: selection beside gradients of activations; folded: before them, but rotated factors beside them."""
        plain, whole = super().backward_bytes(shape, positions, width), shape[0] * shape[1]
        selection = self.memory(shape).selection
        if self.form == "rotated":
            return plain + selection
        return max(selection, plain + 4 * whole) if self.form == "folded" else plain

    def evaluation_bytes(self, shape: Shape, positions: int, width: int) -> int:
        """The rotated form's two inner products, and under autocast a copy of the larger basis."""
        plain = super().evaluation_bytes(shape, positions, width)
        if self.form != "rotated":
            return plain
        return plain + 2 * positions * width * min(shape) + (2 * max(shape) ** 2 if width < 4 else 0)

    def _core(self, shape: Shape) -> Shape:
        """Rows and columns of the truncated form's core; ``input`` has no column where k is below the outputs."""
        k = kept_entries(self.k, self.density, shape)
        return (shape[0], min(k // shape[0], shape[1])) if self.core == "input" else core_shape(k, shape)


def _select_in(asked: str, config: Configuration) -> str:
    """``step`` or ``backward``; ``auto`` is what was measured to be faster: all layers at once on a card.

    On a CPU a layer's factors are rotated before their product, which is fewer operations, where steps are one backward
    pass.
    """
    if asked == "backward" and not config.one_backward_a_step:
        raise ValueError("method.select_in=backward needs steps of one backward pass on one process: use step or auto.")
    if asked != "auto":
        return asked
    return "backward" if config.one_backward_a_step and config.device == "cpu" else "step"


def _rule(path: str) -> Rule:
    """The function of this dotted path.

    Raises:
        ValueError: if there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"method.select={path!r}: {error}; give a function as package.module.function.") from None
    return found
