"""The truncated form beside a linear whose weight is no matrix of floats: 4 or 8 bit, packed, as bitsandbytes keeps it.

The linear is kept as it is and asked for its output and the gradient of its input alone; the core is a side path:

    y = linear(x) + (x U_c^T) S^T V_r
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.linear import autocast, fitting_basis
from sparsegrad.select import check_k
from sparsegrad.truncated import TruncatedLinear, TruncatedProduct, add_product_, checked_ranks

ROWS = 1024  # of the identity at a time, to read a quantised weight


def is_quantized(linear: nn.Module) -> bool:
    """Whether a linear's weight is something else than its ``(out_features, in_features)`` matrix of floats."""
    weight = linear.weight
    return not weight.is_floating_point() or tuple(weight.shape) != (linear.out_features, linear.in_features)


class QuantizedTruncatedLinear(TruncatedLinear):
    """A quantised linear with a trained core beside it.

    Args:
        linear: a subclass of ``nn.Linear`` that passes gradients to its input; kept, its weight frozen.
        basis, k, ranks, keep: as in :class:`TruncatedLinear`.
        update: ``side`` or None.

    Raises:
        ValueError: as :class:`TruncatedLinear`, and on ``update="in_place"``.
    """

    def __init__(
        self,
        linear: nn.Linear,
        basis: Basis | None,
        k: int,
        *,
        ranks: Sequence[int] | None = None,
        keep: int | None = None,
        update: str | None = None,
    ) -> None:
        if basis is None:
            raise ValueError("form 'truncated' trains the leading block of a rotated weight, so it needs a basis.")
        if update not in (None, "side"):
            raise ValueError(f"update={update!r}; a quantised weight takes no steps: use update='side'.")
        nn.Module.__init__(self)
        device = linear.weight.device
        self.out_features, self.in_features = linear.out_features, linear.in_features
        r, c = checked_ranks(k, ranks, basis)
        self.k = r * c if keep is None else check_k(keep, (r, c))
        self.select_in, self.update, self.kind = "step", "side", None
        self.basis = fitting_basis(basis.leading(r, c), (self.out_features, self.in_features), device)
        self.linear = linear
        self._add_core((r, c), keep, torch.float32, device)

    @property
    def weight(self) -> Tensor:
        """The quantised weight, as its linear keeps it."""
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``, in the linear's output dtype."""
        y = self.linear(x)
        side = TruncatedProduct.apply(autocast(x), None, None, self.core, self.basis.U, self.basis.V, True)
        return y + side.to(y.dtype)

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """The weight as its linear computes with it, plus V_r^T S U_c; ``(out_features, in_features)``, float32."""
        bias, self.linear.bias = self.linear.bias, None  # added in low precision it would round the weight
        try:
            parts = []
            for columns in torch.arange(self.in_features, device=self.core.device).split(ROWS):
                x = self.core.new_zeros(len(columns), self.in_features)
                parts.append(self.linear(x.scatter_(1, columns[:, None], 1.0)).float())
        finally:
            self.linear.bias = bias
        return add_product_(torch.cat(parts).T.contiguous(), self.basis.V, self.core, self.basis.U)

    def store_weight(self, dtype: torch.dtype) -> None:
        """The weight stays as it is, quantised."""

    def rebase(self, basis: Basis) -> None:
        """Not possible: raises ValueError."""
        raise ValueError("a quantised weight can't take the core in, so its basis can't be changed: merge first.")

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` in the bias' dtype, else the linear's ``compute_dtype``, else float32."""
        dtype = getattr(self.linear, "compute_dtype", None) or torch.float32
        dtype = dtype if self.bias is None else self.bias.dtype
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        plain.weight = nn.Parameter(self.original_weight().to(dtype), requires_grad=self.core.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return plain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedTruncatedLinear:
        core = self.core.detach()
        nn.Module._apply(self, fn, recurse)
        if torch.finfo(self.core.dtype).bits < 32:
            self.core.data = core.to(self.core.device)
        return self
