"""What the training loop and the gradient collection need of a split, whatever the task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Examples(Protocol):
    """Rows that batches are cut from: :class:`finetune.data.glue.Split`, :class:`finetune.data.oasst.PackedSplit`."""

    @property
    def sha256(self) -> str:
        """Of the file that they came from."""
        ...

    @property
    def content(self) -> str:
        """sha256 of what a model gets to see of them: token ids, labels, padding."""
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


def content_of(*arrays: Any) -> str:
    """sha256 of arrays (lists of numbers, CPU tensors), each with its type and shape."""
    digest = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        digest.update(f"{values.dtype.str} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
