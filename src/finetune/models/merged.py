"""Models that training leaves: a folder that ``from_pretrained`` and FastChat load, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.models.load import no_file_bars
from finetune.store.files import folder_atomically, sha256
from finetune.store.records import read_json, write_json

MERGED = "training.json"
"""Beside a merged model: its run's hash, what a reader of it needs, and the sha256 of every file."""


def save_merged(plain: Any, tokenizer: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write a plain model and its tokenizer.

    Args:
        facts: JSON values: ``config_hash`` names the run, so that a model of another one is not taken for this one's.
    """
    with folder_atomically(folder) as temporary:
        with no_file_bars():
            plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / MERGED, {**facts, "files": files})


def read_merged(folder: Path) -> dict[str, Any]:
    """The facts of a merged model whose files are those that were written.

    Raises:
        ValueError: naming the file that is missing or another.
    """
    facts = read_json(folder / MERGED)
    files = facts.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{folder / MERGED} names no files: train the model again.")
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is missing, or another than was written: train the model again.")
    return facts
