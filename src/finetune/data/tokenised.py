"""Tokenised splits in files: what a run reads of its data, for a machine that has neither text nor tokenizer.

One safetensors file a split, with its facts and the hash of its content; what is read is the split that was written.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.data.glue import Split
from finetune.data.oasst import PackedSplit
from sparsegrad import load_tensors, save_tensors


def save_split(path: Path, split: Split | PackedSplit) -> None:
    """Write a split of GLUE, or of dialogues."""
    facts: dict[str, Any] = {"content": split.content, "sha256": split.sha256}
    if isinstance(split, PackedSplit):
        tensors = {"input_ids": split.input_ids.int(), "labels": split.labels.int()}
        save_tensors(path, tensors, facts | {"kind": "blocks", "facts": split.facts})
        return
    tensors = {"input_ids": _flat(split.input_ids), "labels": split.labels}
    tensors["lengths"] = torch.tensor([len(row) for row in split.input_ids], dtype=torch.int32)
    if split.token_type_ids is not None:
        tensors["token_type_ids"] = _flat(split.token_type_ids)
    save_tensors(path, tensors, facts | {"kind": "rows", "pad_token_id": split.pad_token_id, "length": split.length})


def load_split(path: Path) -> Split | PackedSplit:
    """Read a split.

    Raises:
        ValueError: if the file is missing, damaged, or holds another content than it says.
    """
    tensors, facts = load_tensors(path)
    if facts.get("kind") == "blocks":
        split = PackedSplit(tensors["input_ids"].long(), tensors["labels"].long(), facts["sha256"], facts["facts"])
    elif facts.get("kind") == "rows":
        lengths, types = tensors["lengths"].tolist(), tensors.get("token_type_ids")
        split = Split(
            input_ids=_rows(tensors["input_ids"], lengths),
            token_type_ids=None if types is None else _rows(types, lengths),
            labels=tensors["labels"],
            pad_token_id=facts["pad_token_id"],
            length=facts["length"],
            sha256=facts["sha256"],
        )
    else:
        raise ValueError(f"{path} holds {facts.get('content')!r}, no tokenised split: carry the experiment again.")
    if split.content != facts["content"]:
        raise ValueError(f"{path} is not the split that it was written of: carry the experiment again.")
    return split


def _flat(rows: list[list[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32)


def _rows(flat: Tensor, lengths: list[int]) -> list[list[int]]:
    return [row.tolist() for row in flat.split(lengths)]
