"""Token lengths of a task, and batches of random tokens that have them.

A lengths file is JSON: ``task``, ``source`` (where the lengths come from), and ``counts``: tokens of an example ->
number of examples.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.config.names import NAME_RULE, is_name
from finetune.store import records

PADDINGS = ("longest", "max_length")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Lengths:
    """Tokens of every example of a task.

    Attributes:
        task: its name.
        source: where the lengths come from, for the record.
        values: one length an example, special tokens included.

    Raises:
        ValueError: if there are none, or one is not a whole number of at least 1.
    """

    task: str
    source: str
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        wrong = [value for value in self.values if not isinstance(value, int) or value < 1]
        if not self.values or wrong:
            raise ValueError(f"lengths of {self.task}: {wrong[:3] or 'none'}; needed are whole numbers, at least 1.")

    def facts(self) -> dict[str, Any]:
        """Source, sha256, number of examples, mean and quantiles, for the record."""
        found = torch.tensor(self.values, dtype=torch.float64)
        spread = torch.quantile(found[:: max(1, len(found) // 1_000_000)], torch.tensor(QUANTILES, dtype=torch.float64))
        counts = json.dumps(sorted(Counter(self.values).items()))
        return {
            "source": self.source,
            "sha256": hashlib.sha256(counts.encode()).hexdigest(),
            "examples": len(self.values),
            "mean": float(found.mean()),
            "quantiles": {str(q): float(v) for q, v in zip(QUANTILES, spread, strict=True)},
        }

    def content(self) -> dict[str, Any]:
        """What a lengths file holds."""
        counts = {str(length): count for length, count in sorted(Counter(self.values).items())}
        return {"task": self.task, "source": self.source, "counts": counts}


def read_lengths(path: str | Path) -> Lengths:
    """Read a lengths file.

    Raises:
        ValueError: if it is missing or damaged, or lacks a key.
    """
    content = records.read_json(path)
    kinds = {"task": str, "source": str, "counts": Mapping}
    if any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} has the keys {sorted(content)}; needed are task, source and counts.")
    if not is_name(content["task"]):
        raise ValueError(f"{path}: task={content['task']!r}; allowed: a name of {NAME_RULE}.")
    try:
        values = [int(length) for length, count in content["counts"].items() for _ in range(int(count))]
        return Lengths(content["task"], content["source"], tuple(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: counts can't be read: {error}") from None


def rows_of(rows: int, tokens: int) -> Lengths:
    """Rows of equal length, as dialogues are packed."""
    return Lengths(f"rows{rows}", f"rows of {tokens} tokens", (tokens,) * rows)


def make_batches(
    lengths: Lengths,
    *,
    batch_size: int,
    batches: int,
    padding: str,
    max_length: int,
    vocabulary: int,
    padding_id: int,
    num_labels: int,
    seed: int,
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Batches of random tokens whose lengths are drawn from a task's, without replacement while they last.

    Args:
        lengths: of the task; longer ones are cut to ``max_length``, as the tokenizer cuts.
        padding: ``longest`` of a batch, or ``max_length``.
        vocabulary, padding_id: of the model; no token is the padding id.
        num_labels: classes; 1 gives float targets.

    Returns:
        Batches with ``input_ids`` and ``attention_mask`` int64 ``(batch, tokens)`` and ``labels`` ``(batch,)``; and for
        the record, tokens of each batch and the share of them that is padding.

    Raises:
        ValueError: on an unknown padding.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r}; allowed: {', '.join(PADDINGS)}.")
    generator = torch.Generator().manual_seed(seed)
    drawn = _draw(lengths.values, batches * batch_size, generator)
    made, shapes = [], []
    for start in range(0, len(drawn), batch_size):
        rows = [min(length, max_length) for length in drawn[start : start + batch_size]]
        width = max_length if padding == "max_length" else max(rows)
        mask = (torch.arange(width) < torch.tensor(rows)[:, None]).long()
        ids = torch.randint(vocabulary - 1, (batch_size, width), generator=generator)
        ids = torch.where(mask.bool(), ids + (ids >= padding_id), padding_id)
        labels = torch.randint(max(2, num_labels), (batch_size,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels.float() if num_labels == 1 else labels})
        shapes.append({"rows": batch_size, "tokens": width, "padded_share": 1 - sum(rows) / (batch_size * width)})
    slots = sum(shape["rows"] * shape["tokens"] for shape in shapes)
    padded = sum(shape["rows"] * shape["tokens"] * shape["padded_share"] for shape in shapes) / slots
    return made, {"batches": shapes, "mean_slots": slots / len(shapes), "padded_share": padded}


def _draw(values: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        order = torch.randperm(len(values), generator=generator)[: count - len(found)]
        found += [values[place] for place in order.tolist()]
    return found
