"""Inputs of the rotation's record as one small folder: a checkpoint in half precision, and tokenised tasks.

Made where checkpoint and data are, read where nothing else is:

    python -m finetune.efficiency.rotation_inputs --model conf/model/minilm.yaml --data conf/data/glue.yaml \
        --root data --tasks stsb mrpc --output outputs/rotation

Of the vocabulary the tokens of these tasks alone are kept, under new ids: they are what a model gets to see.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune import models
from finetune.store import records
from finetune.store.boundary import exit_with_message
from finetune.store.files import read_yaml
from sparsegrad import load_tensors, save_tensors

if TYPE_CHECKING:  # reading a task needs pyarrow
    from finetune.data.glue import Split, Task

log = logging.getLogger("finetune.efficiency")

MODEL = "model.json"
KEPT = ("name", "title", "target_modules", "layers_to_transform")
MAX_LENGTH = 128


def prepare(
    model: Mapping[str, Any], data: Mapping[str, Any], root: str | Path, tasks: Sequence[str], folder: Path
) -> None:
    """Write the checkpoint with :data:`MODEL` beside it, and ``<task>.safetensors`` for every task.

    Args:
        model, data: configuration groups.
        root: ``data.root``.
        tasks: names.

    Raises:
        ValueError: if the checkpoint or a task is missing or damaged.
    """
    from finetune.data.glue import load_task

    tokenizer = models.load_tokenizer(model, root)
    how = {"max_length": MAX_LENGTH, "padding": "longest"}
    loaded = [load_task({**data, "root": root, "task": name}, tokenizer, **how) for name in tasks]
    splits = [split for _, found in loaded for split in found.values()]
    pad = splits[0].pad_token_id
    used = torch.tensor([pad, *(token for split in splits for row in split.input_ids for token in row)]).unique()
    _write_checkpoint(model, root, used, pad, folder)
    for task, found in loaded:
        tensors = {f"{role}.{n}": t for role, split in found.items() for n, t in _pack(split, used).items()}
        own = {"name": data["name"], "task": task.name, "tasks": {task.name: data["tasks"][task.name]}}
        facts = {"content": "examples", "data": own, "pad_token_id": int(torch.searchsorted(used, pad))}
        save_tensors(folder / f"{task.name}.safetensors", tensors, facts)


def read_model(folder: str | Path) -> dict[str, Any]:
    """The ``model`` group of a prepared folder.

    Raises:
        ValueError: if it is none.
    """
    found = records.read_json(Path(folder) / MODEL)
    if missing := [name for name in KEPT if name not in found]:
        raise ValueError(f"{Path(folder) / MODEL} lacks {', '.join(missing)}: prepare the folder again.")
    return found | {"checkpoint": str(folder), "folder": "", "random_weights": False}


def read_examples(path: str | Path) -> tuple[Task, dict[str, Split]]:
    """A task and its splits ``train`` and ``validation``.

    Raises:
        ValueError: if the file is missing, damaged, or holds something else.
    """
    from finetune.data.glue import Split, Task

    tensors, facts = load_tensors(path)
    if facts.get("content") != "examples":
        raise ValueError(f"{path} holds {facts.get('content')!r}, not examples: prepare the folder again.")
    splits = {}
    for role in ("train", "validation"):
        ids, lengths = tensors[f"{role}.input_ids"], tensors[f"{role}.lengths"].tolist()
        types = tensors.get(f"{role}.token_type_ids")
        rows = [None if flat is None else [row.tolist() for row in flat.split(lengths)] for flat in (ids, types)]
        assert rows[0] is not None  # there are ids
        splits[role] = Split(rows[0], rows[1], tensors[f"{role}.labels"], facts["pad_token_id"])
    return Task.from_config(facts["data"]), splits


def _write_checkpoint(model: Mapping[str, Any], root: str | Path, used: Tensor, pad: int, folder: Path) -> None:
    plain: Any = models.load_classifier(model, root, num_labels=2, seed=0)
    weight = plain.get_input_embeddings().weight.detach()
    plain.set_input_embeddings(nn.Embedding.from_pretrained(weight[used]))
    plain.config.vocab_size, plain.config.pad_token_id = len(used), int(torch.searchsorted(used, pad))
    plain.base_model.half().save_pretrained(folder)  # without a head: a run draws its own
    records.write_json(folder / MODEL, {name: model[name] for name in KEPT})


def _pack(split: Split, used: Tensor) -> dict[str, Tensor]:
    """Rows end to end, ids as places in ``used``."""
    rows = [torch.tensor(row) for row in split.input_ids]
    found = {"input_ids": torch.searchsorted(used, torch.cat(rows)).to(torch.int32), "labels": split.labels}
    if split.token_type_ids is not None:
        found["token_type_ids"] = torch.cat([torch.tensor(row, dtype=torch.uint8) for row in split.token_type_ids])
    return found | {"lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare a folder.

    Raises:
        SystemExit: with one line of explanation, if an argument or a file is refused.
    """
    parser = argparse.ArgumentParser(prog="python -m finetune.efficiency.rotation_inputs", description=__doc__)
    parser.add_argument("--model", required=True, help="a model's YAML file, such as conf/model/minilm.yaml")
    parser.add_argument("--data", required=True, help="a data set's, such as conf/data/glue.yaml")
    parser.add_argument("--root", required=True, help="folder of models and data, data.root")
    parser.add_argument("--tasks", required=True, nargs="+", help="names in the data set's file")
    parser.add_argument("--output", required=True, help="folder to write")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_with_message():
        folder = Path(given.output)
        prepare(read_yaml(Path(given.model)), read_yaml(Path(given.data)), given.root, given.tasks, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        log.info("%s: %.1f MB", folder, size / 1e6)


if __name__ == "__main__":
    main()
