"""The truncated form beside a linear whose weight is no matrix of floats: 4 or 8 bit, of bitsandbytes or torchao.

The linear is kept as it is and asked for its output and the gradient of its input alone; the core is a side path:

    y = linear(x) + (x U_c^T) S^T V_r
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.core import CoreLinear
from sparsegrad.linear import autocast, version
from sparsegrad.select import Rule, top_k
from sparsegrad.truncated import TruncatedProduct, add_product_

ROWS = 1024  # of the identity at a time, to read a quantised weight


def is_quantized(linear: nn.Linear) -> bool:
    """Whether a linear's weight is something else than its ``(out_features, in_features)`` matrix of floats.

    bitsandbytes packs it in bytes; torchao and optimum-quanto let several tensors behave as one of floats.
    """
    weight, shape = linear.weight, (linear.out_features, linear.in_features)
    return not weight.is_floating_point() or tuple(weight.shape) != shape or hasattr(weight, "__tensor_flatten__")


class QuantizedTruncatedLinear(CoreLinear):
    """A quantised linear with a trained core beside it.

    Args:
        linear: a subclass of ``nn.Linear`` that passes gradients to its input; kept, its weight frozen.
        basis, k, ranks, keep, select: as in :class:`~sparsegrad.core.CoreLinear`.
        update: ``side`` or None.

    Raises:
        ValueError: as :class:`~sparsegrad.core.CoreLinear`, and on ``update="in_place"``.
    """

    def __init__(
        self,
        linear: nn.Linear,
        basis: Basis | None,
        k: int,
        *,
        ranks: Sequence[int] | None = None,
        keep: int | None = None,
        select: Rule = top_k,
        update: str | None = None,
    ) -> None:
        if update not in (None, "side"):
            raise ValueError(f"update={update!r}; a quantised weight takes no steps: use update='side'.")
        shape, device = (linear.out_features, linear.in_features), linear.weight.device
        super().__init__(shape, basis, k, ranks=ranks, keep=keep, select=select, update="side", device=device)
        self.linear = linear
        linear.weight.requires_grad_(False)
        self.core = self._zero_core(torch.float32)
        self._seen = version(self.weight)

    @property
    def weight(self) -> Tensor:
        """The quantised weight, as its linear keeps it."""
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter | None:  # pyright: ignore[reportIncompatibleVariableOverride] - its linear's
        return self.linear.bias

    @property
    def moves_weight(self) -> bool:
        return False

    @property
    def plain_state(self) -> bool:
        return False

    @property
    def plain_dtype(self) -> torch.dtype:
        """The bias' dtype, else the linear's ``compute_dtype``, else float32."""
        own = getattr(self.linear, "compute_dtype", None) or torch.float32
        return own if self.bias is None else self.bias.dtype

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``, in the linear's output dtype."""
        y = self.linear(x)
        side = TruncatedProduct.apply(autocast(x), None, None, self.core, self.basis.U, self.basis.V, True)
        return y + side.to(y.dtype)

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """The weight as its linear computes with it, plus V_r^T S U_c; ``(out_features, in_features)``, float32."""
        bias = self.linear.bias
        self.linear.bias = None  # pyright: ignore[reportAttributeAccessIssue] - added, it would round the weight
        try:
            parts = []
            for columns in torch.arange(self.in_features, device=self.core.device).split(ROWS):
                x = self.core.new_zeros(len(columns), self.in_features)
                parts.append(self.linear(x.scatter_(1, columns[:, None], 1.0)).float())
        finally:
            self.linear.bias = bias
        return add_product_(torch.cat(parts).T.contiguous(), self.basis.V, self.core, self.basis.U)
