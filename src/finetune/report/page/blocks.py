"""What a section of the page is made of; the templates know these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Text(NamedTuple):
    """A text with a look: ``none`` (missing), ``strong`` or ``code``."""

    text: str
    kind: str


class Grid(NamedTuple):
    """A plain table; the caption names its scrolling box, the first cell of a row is its header."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    block: str = "grid"


class Paragraph(NamedTuple):
    """A text; ``kind`` is its class."""

    text: str
    kind: str = ""
    block: str = "paragraph"


class Items(NamedTuple):
    texts: Sequence[str]
    block: str = "items"


class Heading(NamedTuple):
    """A heading of the third level, which the contents list."""

    id: str
    title: str
    block: str = "heading"


Block = Grid | Paragraph | Items | Heading
