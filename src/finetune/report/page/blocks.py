"""What a section of the page is made of; the templates know these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A text with a look: ``none`` (missing), ``strong`` or ``code``."""

    text: str
    kind: str


@dataclass(frozen=True)
class Grid:
    """A plain table; the first cell of a row is its header.

    Attributes:
        caption: Read first by a screen reader, and the name of the scrolling box.
        head: Column labels.
        rows: Cells of each row.
        quiet: Whether the caption is for screen readers alone.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    quiet: bool = False
    block: ClassVar[str] = "grid"


@dataclass(frozen=True)
class Paragraph:
    """A text; ``kind`` is its class."""

    text: str
    kind: str = ""
    block: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]
    block: ClassVar[str] = "items"


@dataclass(frozen=True)
class Heading:
    """A heading of the third level, which the contents list."""

    id: str
    title: str
    block: ClassVar[str] = "heading"


Block = Grid | Paragraph | Items | Heading
