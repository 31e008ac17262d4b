"""The files of a checkpoint's folder, looked at before transformers reads them: it names no file, and misses some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
AGAIN = "fetch it again (experiments/fetch.py), or run the stage that writes it."


def check_json(folder: Path, *names: str) -> None:
    """Refuse a file that is there and holds no JSON object.

    Raises:
        ValueError: naming the file.
    """
    for name in names:
        if (folder / name).exists():
            read_object(folder / name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: ``model.safetensors``, or all shards that its index names.

    Raises:
        ValueError: if one is missing or damaged, or weights lie beside them that would not be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors file; weights in other formats are not read.")
    named = _named(folder / INDEX) if (folder / INDEX).exists() else {"model.safetensors"}
    there = {file.name for file in files}
    if missing := sorted(named - there):
        raise ValueError(f"{folder} lacks {', '.join(missing)}; it has {', '.join(sorted(there))}: {AGAIN}")
    if beside := sorted(name for name in there - named if name.startswith("model")):
        raise ValueError(
            f"{folder}: {', '.join(beside)} beside {', '.join(sorted(named))}: another export, or downloaded twice; "
            "keep one."
        )
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged, or no safetensors file ({error}): {AGAIN}") from None
    return files


def _named(index: Path) -> set[str]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from weights to files: {AGAIN}")
    return set(names.values())


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that others may have written.

    Raises:
        ValueError: if it is missing or holds something else, naming the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({' '.join(str(error).split())}): {AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: {AGAIN}")
    return content
