"""Names that become files and folders, and the names of the methods' modules. Needs no pydantic."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
"""What names a file or folder, as a whole: it stays in its folder, and is no option, no hidden file, not too long."""

NAME_RULE = "letters, digits and . _ + -, beginning with a letter or digit, at most 64"


def is_name(text: object) -> bool:
    """Whether a value may name a file or folder."""
    return isinstance(text, str) and NAME.fullmatch(text) is not None


def method_modules() -> list[str]:
    """The modules of :mod:`finetune.methods` that implement a method, read from their folder."""
    folder, shared = Path(__file__).parents[1] / "methods", ("adapters", "base", "costs")
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if module.name not in shared)
