"""Sizes that a plan needs of data that may not be there: rows, tokens of a row, epochs until early stopping."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from finetune.efficiency.lengths import read_lengths
from finetune.published import read_csv
from finetune.store import records
from finetune.store.shards import shards

_MODELS = {"bert-base-uncased": "bert_base", "roberta-base": "roberta_base", "roberta-large": "roberta_large"}
_METHODS = {"ft": "full", "lora": "lora", "sparse": "sparsegrad"}
_EPOCHS = re.compile(r"epochs trained ([0-9.]+)")


def stopping_epochs() -> dict[tuple[str, str, str], float]:
    """(model, method, task) -> mean epochs after which the authors' logged runs had stopped; 415 rows of their logs.

    MeProp was not logged: it gets the mean of the three others.
    """
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in read_csv("released_glue_per_seed.csv"):
        epochs = _EPOCHS.search(row["note"])
        if epochs and row["model"] in _MODELS:
            task = row["task"].lower()
            for method in (_METHODS[row["method"]], "meprop"):
                found[_MODELS[row["model"]], method, task].append(float(epochs[1]))
    return {key: mean(values) for key, values in found.items()}


def task_rows(data: Mapping[str, Any], sizes: Mapping[str, Any], task: str) -> tuple[int, int, str]:
    """Training and validation rows of a task, and where that is known from.

    Files under ``data.root`` count as they are, since a run would read them; else the table of the configuration.

    Args:
        data: the ``data`` group.
        sizes: task -> ``train``, ``validation``, and under ``source`` where they come from.

    Raises:
        ValueError: if a task is in neither, or its files are there in part, twice or damaged.
    """
    folder = Path(data["root"]) / data["folder"] / task
    validation = data["tasks"][task].get("validation", "validation")
    files = [shards(folder, split) for split in ("train", validation)]
    if all(files):
        from finetune.data.tables import count_rows

        train, held = map(count_rows, files)
        return train, held, f"files in {folder}"
    if task not in sizes:
        raise ValueError(
            f"rows of {task} are not known: add rows.{task} to conf/plan.yaml, or put its files into {folder}."
        )
    return sizes[task]["train"], sizes[task]["validation"], sizes["source"]


def chat_blocks(results: Path, chat: str, model: str, assumed: Mapping[str, Any]) -> tuple[int, int, str]:
    """Packed blocks of training and validation: from a record of the model on this data, else as assumed.

    Raises:
        ValueError: if neither is there.
    """
    for path in sorted(results.glob(f"*/runs/{model}/*/cell.json")):
        for place, record in records.iterate(path.parent):
            rows = record["data"]["rows"]
            return rows["train"], rows["validation"], str(place)
    if chat not in assumed:
        raise ValueError(f"blocks of {chat} are not known: add blocks.{chat} to conf/plan.yaml.")
    return assumed[chat]["train"], assumed[chat]["validation"], assumed[chat]["source"]


def padded_tokens(
    results: Path, lengths: Path, model: Mapping[str, Any], protocol: Mapping[str, Any], task: str, batch: int
) -> tuple[float, str]:
    """Tokens of a padded row, and where that is known from.

    With padding to the longest of a batch, from an efficiency record of the model and task; else the mean of the
    longest of ``batch`` rows by a file of token lengths, of this model or another one; else ``max_length``, cut to the
    positions that the model has: an upper bound.

    Args:
        lengths: folder of files of :mod:`finetune.efficiency.lengths`, ``<model>/<task>.json``.
    """
    limit = min(protocol["max_length"], (model["architecture"] or {}).get("max_position_embeddings", 10**9))
    if protocol["padding"] == "max_length":
        return limit, "protocol.max_length"
    for path in sorted(results.glob(f"*/efficiency/{model['name']}*/{task}.json")):
        record = records.read_record(path)
        if record["run"]["model"] == model["name"] and record["treatment"]["padding"] == "longest":
            return record["lengths"]["mean_slots"] / record["treatment"]["batch_size"], str(path)
    for path in sorted(lengths.glob(f"*/{task}.json"), key=lambda path: path.parent.name != model["name"]):
        values = np.minimum(read_lengths(path).values, limit)
        shares = np.searchsorted(np.sort(values), np.arange(limit), side="right") / len(values)
        return float((1 - shares**batch).sum()), f"lengths of {path.parent.name}'s tokens, conf/lengths"
    return limit, "protocol.max_length, an upper bound: rows are padded to the longest of a batch"
