"""What the training loop and the gradient collection need of a split, whatever the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Examples(Protocol):
    """Rows that batches are cut from: :class:`finetune.data.glue.Split`, :class:`finetune.data.oasst.PackedSplit`."""

    @property
    def sha256(self) -> str:
        """Of the file that they came from."""
        ...

    def __len__(self) -> int: ...

    @property
    def longest(self) -> int:
        """Tokens of the longest row that a batch can hold."""
        ...

    @property
    def largest_id(self) -> int:
        """The largest token id that a batch can hold."""
        ...

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs, and ``labels``."""
        ...

    def targets(self, indices: Sequence[int]) -> int:
        """How many predictions the summed loss of these rows adds up."""
        ...
