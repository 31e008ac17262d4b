"""HTML in which every text is escaped unless it says that it is markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "hr", "meta"})
"""Elements without content."""


class Html(str):
    """Markup. Every other string is text."""

    __slots__ = ()


Child = str | None


def tag(name: str, *children: Child, **attributes: str | int | bool | None) -> Html:
    """An element.

    Args:
        name: of the element.
        children: markup, or texts to escape; None is passed over.
        attributes: ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``; True gives a bare attribute,
            None and False none.

    Returns:
        The element as markup.
    """
    given = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            given += f" {key}" if value is True else f' {key}="{escape(str(value), quote=True)}"'
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Child], between: str = "") -> Html:
    """Markup and escaped texts one after another.

    Args:
        children: as of :func:`tag`.
        between: text between them.
    """
    parts = [
        child if isinstance(child, Html) else escape(child, quote=False) for child in children if child is not None
    ]
    return Html(escape(between, quote=False).join(parts))


def items(texts: Iterable[Child], **attributes: str | None) -> Html:
    """An unordered list, a line an item."""
    return tag("ul", "\n", *(join([tag("li", text), "\n"]) for text in texts), **attributes)


def scrolled(table: Html, label: str) -> Html:
    """A wide table in a box of its own that scrolls, by keyboard too, so that the page never does sideways."""
    return tag("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)


def grid(head: Iterable[Child], rows: Iterable[Iterable[Child]], caption: str, *, quiet: bool = False) -> Html:
    """A plain table; the first cell of a row is its header.

    Args:
        head: texts of the column headers.
        rows: cells of each row.
        caption: read first by a screen reader, and the name of the scrolling box.
        quiet: whether the caption is for screen readers alone.
    """
    top = tag("tr", *(tag("th", text, scope="col") for text in head))
    body = [
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest))
        for first, *rest in map(list, rows)
    ]
    name = tag("caption", caption, class_="hidden" if quiet else None)
    table = tag("table", name, "\n", tag("thead", top), "\n", tag("tbody", join(body, "\n")), "\n")
    return scrolled(table, caption)
