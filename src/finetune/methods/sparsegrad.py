"""SparseGrad behind the comparison's interface; the method itself is the package ``sparsegrad``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.methods.base import Targets, kept_entries
from sparsegrad import Basis, SparseGradAdamW, core_shape, merge, param_groups, sparsify

CORES = ("square", "input")


@dataclass(frozen=True)
class SparseGrad:
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
        drop_after: see :class:`sparsegrad.SparseGradAdamW`.
    """

    targets: Targets
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

    def prepare(self, model: nn.Module) -> nn.Module:
        targets = self.targets.set_trainable(model)
        k = {t.kind: kept_entries(self.k, self.density, tuple(t.module.weight.shape)) for t in targets}
        return sparsify(
            model,
            self._bases(),
            k,
            self.targets.target_modules,
            self.targets.layers_to_transform,
            form=self.form,
            matmul=self.matmul,
            select_in="step" if self.form == "truncated" else self.select_in,
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

    def entries(self, shape: tuple[int, int]) -> int:
        k = kept_entries(self.k, self.density, shape)
        if self.form != "truncated":
            return k
        return prod(core_shape(k, shape)) if self.core == "square" else shape[0] * (k // shape[0])


def random_basis(like: Basis, generator: torch.Generator) -> Basis:
    """A basis of another's shapes, dtype and device, uniform over the orthogonal matrices (in float64, on the CPU)."""

    def draw(factor: Tensor) -> Tensor:
        gaussian = torch.randn(factor.shape[::-1], generator=generator, dtype=torch.float64)
        Q, R = torch.linalg.qr(gaussian)
        return (Q * R.diagonal().sign()).T.contiguous().to(factor)  # with the signs of R: uniform (Mezzadri 2007)

    return Basis(draw(like.U), draw(like.V))
