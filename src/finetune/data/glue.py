"""GLUE tasks from a local folder in the hub's layout, or from the hub; tokenised once, padded batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from finetune.data.examples import content_of
from finetune.data.tables import read_files, read_hub
from finetune.store.shards import shards


@dataclass(frozen=True)
class Task:
    """What the project knows of a task; the values stand in ``conf/data``.

    Attributes:
        name: folder and configuration name, such as ``cola``.
        columns: one or two text columns.
        num_labels: classes; 1 means regression.
        metric: a name of :mod:`finetune.training.metrics`.
        validation: the split that is evaluated; test labels of GLUE are not public.
        label_range: lowest and highest value of a regression label.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    num_labels: int
    metric: str
    validation: str = "validation"
    label_range: tuple[float, float] | None = None

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Task:
        """The task named by ``data.task``.

        Raises:
            ValueError: if ``data.tasks`` does not list it.
        """
        name, tasks = data["task"], data["tasks"]
        if name not in tasks:
            raise ValueError(f"data.task={name!r}; {data['name']} has: {', '.join(sorted(tasks))}.")
        facts: dict[str, Any] = {
            key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            for key, value in tasks[name].items()
        }
        return cls(name=name, **facts)


@dataclass
class Split:
    """A tokenised split: unpadded ids and labels.

    Attributes:
        input_ids: one list of token ids an example.
        token_type_ids: the same for segment ids; None where the tokenizer has none.
        labels: ``(n,)``, int64 classes or float32 targets.
        pad_token_id: id that fills up a batch.
        length: tokens of a padded row; None pads to the longest row of a batch.
        sha256: of the file that it came from.
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    labels: Tensor
    pad_token_id: int
    length: int | None = None
    sha256: str = field(default="", compare=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def content(self) -> str:
        """sha256 of what a model gets to see: token and segment ids, labels, padding."""
        return self._content

    @cached_property
    def _content(self) -> str:
        rows = [[len(row) for row in self.input_ids], list(chain.from_iterable(self.input_ids))]
        types = list(chain.from_iterable(self.token_type_ids or []))
        return content_of(*rows, types, self.labels, [self.pad_token_id, self.length or 0])

    @property
    def longest(self) -> int:
        """Tokens of the longest row that a batch can hold."""
        return self.length or max(len(row) for row in self.input_ids)

    @property
    def largest_id(self) -> int:
        """The largest token id of a batch."""
        return max(self.pad_token_id, max(max(row, default=0) for row in self.input_ids))

    def targets(self, indices: Sequence[int]) -> int:
        """Predictions in these rows: one each."""
        return len(indices)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Padded tensors ``(batch, tokens)`` and labels ``(batch,)`` of the examples."""
        length = self.length or max(len(self.input_ids[i]) for i in indices)
        ids = torch.full((len(indices), length), self.pad_token_id)
        mask = torch.zeros((len(indices), length), dtype=torch.int64)
        types = torch.zeros((len(indices), length), dtype=torch.int64)
        for row, index in enumerate(indices):
            tokens = self.input_ids[index]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            if self.token_type_ids is not None:
                types[row, : len(tokens)] = torch.tensor(self.token_type_ids[index])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": self.labels[list(indices)]}
        return batch if self.token_type_ids is None else batch | {"token_type_ids": types}


def load_task(
    data: Mapping[str, Any], tokenizer: Any, *, max_length: int, padding: str, limit: int | None = None
) -> tuple[Task, dict[str, Split]]:
    """Read, check and tokenise the two splits that training needs.

    Args:
        data: the ``data`` group: root, folder, source, revision, task, tasks.
        tokenizer: a Hugging Face tokenizer.
        max_length: longer inputs are cut, the longer sentence of a pair first.
        padding: ``longest`` of a batch, or ``max_length`` as the released code pads.
        limit: read at most so many training rows, the first ones.

    Returns:
        The task and its splits ``train`` and ``validation``.

    Raises:
        ValueError: on an unknown task, missing files or columns, or labels out of range.
    """
    task = Task.from_config(data)
    splits = {}
    for role, split in (("train", "train"), ("validation", task.validation)):
        table, digest = _read_split(data, task.name, split)
        if role == "train" and limit is not None:
            table = table.slice(0, limit)
        length = max_length if padding == "max_length" else None
        splits[role] = replace(encode(table, task, tokenizer, max_length), length=length, sha256=digest)
    return task, splits


def encode(table: pa.Table, task: Task, tokenizer: Any, max_length: int) -> Split:
    """Tokenise a table after checking that no column, row, cell or label is missing or out of range."""
    needed = [*task.columns, "label"]
    if missing := [name for name in needed if name not in table.column_names]:
        raise ValueError(
            f"{task.name}: columns {missing} are missing; the file has {table.column_names}, needed {needed}."
        )
    if table.num_rows == 0:
        raise ValueError(f"{task.name}: the file has no rows.")
    if empty := [name for name in needed if table.column(name).null_count]:
        raise ValueError(f"{task.name}: columns {empty} hold empty cells; every example needs its text and label.")
    if odd := [f"{n} ({table.schema.field(n).type})" for n in task.columns if not _is_text(table.schema.field(n).type)]:
        raise ValueError(f"{task.name}: columns {', '.join(odd)} are no text; every example needs its text and label.")
    texts = [table.column(name).to_pylist() for name in task.columns]
    tokens = tokenizer(*texts, truncation="longest_first", max_length=max_length)
    if not all(tokens["input_ids"]):
        row = tokens["input_ids"].index([])
        raise ValueError(f"{task.name}: row {row} has no token: its text is empty, and the tokenizer adds none.")
    return Split(
        input_ids=tokens["input_ids"],
        token_type_ids=tokens.get("token_type_ids"),
        labels=_labels(table, task),
        pad_token_id=padding_id(tokenizer),
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def padding_id(tokenizer: Any) -> int:
    """What fills up a batch: the padding token, of a decoder's tokenizer without one its end token; it is masked.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise ValueError(
            "the tokenizer has neither pad_token nor eos_token, so rows can't be filled up: set pad_token in its "
            "tokenizer_config.json."
        )
    return found


def _labels(table: pa.Table, task: Task) -> Tensor:
    column = table.column("label")
    regression, kind = task.num_labels == 1, column.type
    if not (pa.types.is_integer(kind) or (regression and pa.types.is_floating(kind))):
        raise ValueError(
            f"{task.name}: labels are of type {kind}; needed: {'numbers' if regression else 'whole numbers'}."
        )
    if not pc.all(pc.is_finite(column)).as_py():
        raise ValueError(f"{task.name}: some labels are NaN or infinite; every example needs its label.")
    low, high = pc.min(column).as_py(), pc.max(column).as_py()
    if regression:
        bounds = task.label_range or (float("-inf"), float("inf"))
        if low < bounds[0] or high > bounds[1]:
            raise ValueError(f"{task.name}: labels from {low} to {high}; allowed: {bounds[0]} to {bounds[1]}.")
        return torch.tensor(column.to_pylist(), dtype=torch.float32)
    if low < 0 or high >= task.num_labels:
        hint = " (-1 marks GLUE's unlabelled test split)" if low < 0 else ""
        raise ValueError(f"{task.name}: labels from {low} to {high}{hint}; allowed: 0 to {task.num_labels - 1}.")
    return torch.tensor(column.to_pylist(), dtype=torch.int64)


def _read_split(data: Mapping[str, Any], task: str, split: str) -> tuple[pa.Table, str]:
    """The split as a table, and the sha256 of its files."""
    folder = Path(data["root"]) / data["folder"] / task
    if not folder.is_dir():
        return read_hub(data, split, folder, task)
    if files := shards(folder, split):
        return read_files(files)
    raise ValueError(f"{folder} has no {split}-*.parquet; the layout is the hub's (train-00000-of-00001.parquet).")
