"""Few token lengths: batches are filled up to a multiple, so that few CUDA graphs serve all."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from finetune.models import positions

PAD_TO = 8  # tokens: what tensor cores want, and few lengths


def padded(batch: Mapping[str, Tensor], model: nn.Module, multiple: int = PAD_TO) -> dict[str, Tensor]:
    """A batch with its token length rounded up to a multiple, or to all that the model takes.

    Args:
        batch: ``input_ids`` ``(rows, tokens)`` get the model's padding id, labels of that shape -100, all else of that
            shape zeros.
    """
    ids = batch.get("input_ids")
    if ids is None:
        return dict(batch)
    limit = positions(model)
    wanted = -(-ids.shape[1] // multiple) * multiple
    more = (wanted if limit is None else max(ids.shape[1], min(wanted, limit))) - ids.shape[1]
    found = dict(batch)
    fill = {"input_ids": getattr(model.config, "pad_token_id", None) or 0, "labels": -100}
    for name, tensor in batch.items():
        if more and tensor.shape == ids.shape:
            found[name] = F.pad(tensor, (0, more), value=fill.get(name, 0))
    return found
