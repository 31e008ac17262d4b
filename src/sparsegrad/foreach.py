"""torch's operations on lists of tensors, as its optimizers call them: one launch for all. torch has no public name."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor


def add_(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``target += other`` of each pair."""
    torch._foreach_add_(list(targets), list(others))


def copy_(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Copy each into its target, cast to its dtype."""
    torch._foreach_copy_(list(targets), list(others))


def zero_(targets: Sequence[Tensor]) -> None:
    """Set each to zero."""
    torch._foreach_zero_(list(targets))


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The largest absolute value of each, NaN where it holds one."""
    return list(torch._foreach_norm(list(tensors), inf))
