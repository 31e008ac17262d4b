"""Pieces of Markdown pages: texts escaped, rows of tables, estimates with intervals, p-values.

Titles, labels and a judge's name come from files, and nothing in them may become a link, an image, HTML or another
cell. What has no meaning where it stands is left as it is, so that pages are read well as plain text too.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

_PIPE = r"\|"
_ENTITIES = {"<": "&lt;", "&": "&amp;"}

_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_ACTIVE = re.compile(
    r"[\\`*~$]"  # escapes, code, emphasis, strikethrough, formulas
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; inside of a word it is none
    r"|<(?=[A-Za-z/!?])"  # HTML
    r"|&(?=#?\w+;)"  # entities
    r"|(?<=\])[(\[:]"  # the address of a link or an image
    r"|(?<=:)//|(?<=\bwww)\.",  # bare addresses, which become links
    re.IGNORECASE,
)
_INDENT = re.compile(r"^\s{2,}")  # four are code
_START = re.compile(r"^(\s*)(?:(\d{1,9})([.)](?=\s|$))|(#{1,6}(?=\s|$)|>|[-+](?=\s|$)|[-=:|](?=[-=:| ]*$)))")
"""What makes a line a list, a heading, a quote, or a part of a table; in a cell it does nothing."""


def escape(text: Any) -> Markup:
    """A text in which no character means anything to Markdown, on one line; what is Markdown already stays."""
    if isinstance(text, Markup):
        return text
    return Markup(_START.sub(r"\1\2\\\3\4", _INDENT.sub(" ", _inline(str(text)))))


def environment(loader: jinja2.BaseLoader | None = None) -> jinja2.Environment:
    """Templates of Markdown pages: each ``{{ }}`` is escaped; what a macro, `row` or `head` gives is not again."""
    found = jinja2.Environment(
        loader=loader,
        autoescape=True,  # macros then give Markup, and what `finalize` made of a text is left as it is
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters |= {"row": row, "head": head}
    return found


def row(cells: Iterable[Any]) -> Markup:
    """A line of a Markdown table."""
    texts = (str(cell) if isinstance(cell, Markup) else _inline(str(cell)) for cell in cells)
    return Markup(f"| {' | '.join(text.replace('|', _PIPE) for text in texts)} |")


def head(cells: Sequence[Any]) -> Markup:
    """The head of a Markdown table."""
    return Markup(f"{row(cells)}\n{row(['---'] * len(cells))}")


def interval(estimate: Mapping[str, Any] | None, sign: str = "", places: int = 2) -> str:
    """Format an estimate or a difference with its interval; `-` where there is none."""
    if not estimate:
        return "-"
    value, low, high = (estimate.get(name) for name in ("mean" if "mean" in estimate else "value", "low", "high"))
    ends = "no interval" if low is None else f"{low:{sign}.{places}f}, {high:{sign}.{places}f}"
    return f"{value:{sign}.{places}f} [{ends}]"


def p_value(p: float | None) -> str:
    """Format a p-value to two digits; `-` where there is none."""
    if p is None:
        return "-"
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _inline(text: str) -> str:
    return _ACTIVE.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), _BREAKS.sub(" ", text))
