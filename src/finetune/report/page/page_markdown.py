"""The Markdown that this project's writers make, as markup: headings, paragraphs, lists and tables, nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from finetune.report.page.markup import Html, grid, items, join, tag

_CELL = re.compile(r"(?<!\\)\|")


def markdown_html(text: str, name: str) -> Html:
    """Render a page without its title; headings of the second level become the third of the report.

    Args:
        text: The page.
        name: Put in front of the ids of its headings.
    """
    return join(_blocks(text.splitlines(), name), "\n")


def headings(text: str, name: str) -> list[tuple[str, str]]:
    """List (id, title) of the headings of the second level, as :func:`markdown_html` makes them."""
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    return [(f"{name}-{place}", title) for place, title in enumerate(titles, 1)]


def _blocks(lines: list[str], name: str) -> Iterator[Html]:
    title, count, place = "", 0, 0
    while place < len(lines):
        line = lines[place]
        end = place + 1
        if line.startswith("## "):
            count, title = count + 1, line.removeprefix("## ")
            yield tag("h3", title, id=f"{name}-{count}")
        elif line.startswith("|"):
            end = _end(lines, place, "|")
            yield _table(lines[place:end], title)
        elif line.startswith("- "):
            end = _end(lines, place, "- ")
            yield items(one.removeprefix("- ") for one in lines[place:end])
        elif line and not line.startswith("# "):
            yield tag("p", line)
        place = end


def _end(lines: list[str], start: int, mark: str) -> int:
    place = start
    while place < len(lines) and lines[place].startswith(mark):
        place += 1
    return place


def _table(lines: Iterable[str], title: str) -> Html:
    """A table; an empty corner is named for screen readers."""
    head, _, *rows = [[cell.strip().replace("\\|", "|") for cell in _CELL.split(line)[1:-1]] for line in lines]
    head = [text or tag("span", "row", class_="hidden") for text in head]
    return grid(head, [[cell or "none" for cell in row] for row in rows], title or "Table", quiet=True)
