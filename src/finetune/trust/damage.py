"""What can befall a file: half of it, one bit, nothing, another's content, another program's, another version's."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000001"
    "0005fe02fea7356a0000000049454e44ae426082"
)
MARKER = "unpickled"
"""The file that appears where a planted pickle is loaded."""

KINDS = (
    "truncated", "flipped", "emptied", "swapped", "edited", "foreign YAML", "foreign PNG", "pickle", "version", "older",
    "missing", "folder", "dangling",
)  # fmt: skip
_NUMBERS = ("score", "value", "loss", "rating", "mean", "accuracy", "learning_rate", "seconds", "trainable")


class _Planted:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def damage(path: Path, kind: str, draw: random.Random, *, other: Path | None, root: Path) -> str | None:
    """Damage a file.

    Args:
        path: the file.
        kind: one of `KINDS`.
        draw: of the bit, of the number.
        other: the file whose content it is swapped with.
        root: folder of the experiment; where a pickle's mark would appear.

    Returns:
        What was done; None where the kind does not fit the file.
    """
    content = path.read_bytes()
    if kind == "swapped":
        if other is None or other.read_bytes() == content:
            return None
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"with {other.relative_to(root)}"
    if kind == "missing":
        path.unlink()
        return "removed"
    if kind in ("folder", "dangling"):
        path.unlink()
        path.mkdir() if kind == "folder" else path.symlink_to("nowhere")
        return kind
    made = _content(path, content, kind, draw, root)
    if made is None or made[0] == content:
        return None
    path.write_bytes(made[0])
    return made[1]


def _content(path: Path, content: bytes, kind: str, draw: random.Random, root: Path) -> tuple[bytes, str] | None:
    if kind == "truncated":
        return content[: len(content) // 2], f"{len(content) // 2} of {len(content)} bytes"
    if kind == "emptied":
        return b"", "0 bytes"
    if kind == "flipped" and content:
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        flipped = bytes([content[place] ^ (1 << bit)])
        return content[:place] + flipped + content[place + 1 :], f"byte {place}, bit {bit}"
    if kind == "foreign YAML":
        return b"lists:\n- 1\n- [a, b]\nname: another\n", kind
    if kind == "foreign PNG":
        return PNG, kind
    if kind == "pickle":
        return pickle.dumps(_Planted(root / MARKER)), kind
    if path.suffix in (".json", ".jsonl"):
        return _edited_json(path.suffix, content, kind, draw)
    if path.suffix == ".safetensors" and kind in ("version", "older"):
        return _edited_tensors(content, kind)
    return None


def _edited_json(suffix: str, content: bytes, kind: str, draw: random.Random) -> tuple[bytes, str] | None:
    """JSON of another version, of an older layout, or with another number."""
    lines = [json.loads(line) for line in content.splitlines()] if suffix == ".jsonl" else [json.loads(content)]
    if not lines or not isinstance(lines[0], dict):
        return None
    place = draw.randrange(len(lines))
    said = _version(lines[place], kind) if kind in ("version", "older") else _number(lines[place], draw)
    if said is None:
        return None
    if suffix == ".json":
        return (json.dumps(lines[0], indent=1) + "\n").encode(), said
    return "".join(json.dumps(line) + "\n" for line in lines).encode(), f"line {place + 1}: {said}"


def _version(item: dict[str, Any], kind: str) -> str | None:
    if kind == "version":
        names = [name for name in ("schema", "version") if name in item]
        item |= dict.fromkeys(names, 99)
        return f"{names[0]} is 99" if names else None
    name = next(iter(item), None)
    if name is not None:
        item[f"old_{name}"] = item.pop(name)
    return None if name is None else f"{name} is old_{name}"


def _number(item: Any, draw: random.Random) -> str | None:
    """Change one number, best one that says how good something is."""
    found = list(_places(item, ""))
    telling = [one for one in found if any(name in one[0].rpartition("/")[2] for name in _NUMBERS)]
    if not found:
        return None
    path, holder, key = draw.choice(telling or found)
    before = holder[key]
    holder[key] = before + 1 if isinstance(before, int) else before * 1.5 + 0.125
    return f"{path}: {before} is {holder[key]}"


def _places(item: Any, path: str) -> Any:
    entries = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in entries:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{path}/{key}", item, key
        else:
            yield from _places(value, f"{path}/{key}")


def _edited_tensors(content: bytes, kind: str) -> tuple[bytes, str] | None:
    """A safetensors file whose own metadata is another version's, or lacks its first entry."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    held = header.get("__metadata__", {})
    own = json.loads(held["sparsegrad"]) if "sparsegrad" in held else None
    if not own:
        return None
    name = next(iter(own))
    own = own | {"schema": 99, "version": 99} if kind == "version" else {k: v for k, v in own.items() if k != name}
    header["__metadata__"] = held | {"sparsegrad": json.dumps(own)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    said = "version is 99" if kind == "version" else f"without {name}"
    return len(text).to_bytes(8, "little") + text + content[8 + size :], said
