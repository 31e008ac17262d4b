"""Tables of a split: parquet files in the hub's layout, or the hub itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.store.files import write_atomically

AGAIN = "fetch it again, or run the stage that generates it."


def read_files(files: Sequence[Path]) -> tuple[pa.Table, str]:
    """One table of several files, and the sha256 of their contents.

    Raises:
        ValueError: if one is no parquet, two hold the same, or their columns differ.
    """
    contents, tables = [], []
    for file in files:
        try:
            contents.append(file.read_bytes())
            tables.append(pq.read_table(pa.BufferReader(contents[-1])))
            tables[-1].validate(full=True)  # text that is no UTF-8
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is no readable parquet ({' '.join(str(error).split())}); {AGAIN}") from None
    names = ", ".join(str(file) for file in files)
    if len(set(contents)) < len(contents):
        raise ValueError(f"{names}: two of them hold the same; {AGAIN}")
    try:
        return pa.concat_tables(tables), hashlib.sha256(b"".join(contents)).hexdigest()
    except pa.ArrowException as error:
        raise ValueError(f"{names} are of different columns ({' '.join(str(error).split())}); {AGAIN}") from None


def count_rows(files: Sequence[Path]) -> int:
    """Rows of several files, from their metadata alone.

    Raises:
        ValueError: if one is no parquet.
    """
    rows = 0
    for file in files:
        try:
            rows += pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is no readable parquet ({' '.join(str(error).split())}); {AGAIN}") from None
    return rows


def read_hub(data: Mapping[str, Any], split: str, folder: Path, *names: str) -> tuple[pa.Table, str]:
    """A split from the hub, where there is no folder, and its name and revision.

    Args:
        data: the ``data`` or ``chat`` group: name, source, revision.
        folder: where it was looked for.
        names: of a configuration of the dataset, such as GLUE's tasks.

    Raises:
        ValueError: if the group names no source, or it can't be loaded.
    """
    import datasets

    if data["source"] is None:
        raise ValueError(f"{folder} does not exist; the stage that generates {data['name']} writes it.")
    try:
        dataset = datasets.load_dataset(data["source"], *names, split=split, revision=data["revision"])
    except Exception as error:  # datasets raises many kinds for "no network", all meaning the same to a user
        raise ValueError(
            f"{folder} does not exist and {data['source']} could not be loaded from the hub "
            f"({type(error).__name__}: {error}). "
            "Set data.root (or SPARSEGRAD_DATA) to a folder that experiments/fetch.py filled."
        ) from None
    return dataset.data.table, f"{data['source']}@{data['revision']}"


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(path, sink.getvalue().to_pybytes())
