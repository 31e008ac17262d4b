"""Figures on the page: the SVG of each figure put into the page itself.

Several SVG files in one document share one space of ids and one style: matplotlib gives all its files a rule for `*`
and ids that repeat. So every id gets the figure's name in front, every rule of a style its figure's id, and what could
run or load something is refused. The figures' grey becomes the page's, which is readable in light and in dark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from finetune.report.figures.figure_style import GREY
from finetune.report.page.markup import Child, Html, items, tag
from finetune.store import records

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_URL = re.compile(r"url\(['\"]?#([^)'\"]+)['\"]?\)")
_REFUSED = frozenset({"script", "foreignObject", "iframe", "animate", "set", "a"})
_DROPPED = frozenset({"metadata", "title", "desc"})


@dataclass(frozen=True)
class Figure:
    """A figure as its stage left it.

    Attributes:
        name: Of its files.
        title: One line.
        caption: What is shown.
        notes: Sentences on it.
        source: Paths of the records that it is drawn from.
        svg: Its markup, ready for a page.
    """

    name: str
    title: str
    caption: str
    notes: tuple[str, ...]
    source: tuple[str, ...]
    svg: Html


def read_figures(folder: str | Path, first: tuple[str, ...] = ()) -> list[Figure]:
    """Read every `<name>.json` of a folder and the SVG beside it.

    Args:
        folder: Folder of the figures; a missing one has none.
        first: Names in the order of the page; the others follow by name.

    Raises:
        ValueError: If an SVG is missing or no safe SVG, or a JSON lacks title or caption.
    """
    names = sorted(path.stem for path in Path(folder).glob("*.json"))
    names.sort(key=lambda name: first.index(name) if name in first else len(first))
    return [_read(Path(folder) / f"{name}.json") for name in names]


def anchor(name: str) -> str:
    """Id of a figure's heading."""
    return f"figure-{name.removeprefix('figure_').replace('_', '-')}"


def figure_html(figure: Figure, after: Child = None) -> Html:
    """A figure with its caption and notes.

    Args:
        figure: The figure.
        after: What stands under the notes.
    """
    source = f"Drawn from {len(figure.source)} record{'' if len(figure.source) == 1 else 's'}"
    paths = items(tag("code", path) for path in figure.source)
    return tag(
        "figure",
        "\n",
        tag("h3", figure.title, id=anchor(figure.name)),
        "\n",
        tag("div", figure.svg, class_="drawing", role="region", aria_label=figure.title, tabindex=0),
        "\n",
        tag("figcaption", figure.caption),
        "\n",
        items(figure.notes, class_="notes") if figure.notes else None,
        after,
        tag("details", tag("summary", source), "\n", paths) if figure.source else None,
        "\n",
    )


def inline_svg(text: str, name: str, label: str) -> Html:
    """Make an SVG file part of a page.

    Args:
        text: The file.
        name: Put in front of every id; letters, digits, `-` and `_`.
        label: Read by a screen reader in place of the drawing.

    Returns:
        The `svg` element, without fixed size, with ids and style rules of its own.

    Raises:
        ValueError: If it is no SVG, has no size, or holds scripts, handlers or references to other files.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"figure {name}: no SVG ({error}); run the stage that draws it again.") from None
    if root.tag != f"{_SVG}svg":
        raise ValueError(f"figure {name}: the outermost element is {root.tag}, an SVG's is needed.")
    width, height = _size(root, name)
    _clean(root, name)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {
        "viewBox": root.get("viewBox", f"0 0 {width:g} {height:g}"),
        "id": name,
        "role": "img",
        "aria-label": label,
        "style": f"--natural: {width:g}pt",
    }
    return Html(ElementTree.tostring(root, encoding="unicode", short_empty_elements=True).strip())


def _read(path: Path) -> Figure:
    words = records.read_json(path)
    lacking = [key for key in ("title", "caption") if not words.get(key)]
    drawing = path.with_suffix(".svg")
    if lacking or not drawing.is_file():
        raise ValueError(f"{path}: no {' or '.join([*lacking, *([] if drawing.is_file() else [drawing.name])])}.")
    svg = inline_svg(drawing.read_text(encoding="utf-8"), f"drawing-{path.stem}", words["title"])
    notes, source = (tuple(map(str, words.get(key, ()))) for key in ("notes", "source"))
    return Figure(path.stem, words["title"], words["caption"], notes, source, svg)


def _size(root: ElementTree.Element, name: str) -> tuple[float, float]:
    """Width and height in points."""
    given = [root.get(key, "") for key in ("width", "height")]
    found = [re.fullmatch(r"([\d.]+)(pt|px)?", text) for text in given]
    if not all(found):
        raise ValueError(f"figure {name}: width={given[0]!r}, height={given[1]!r}; points are needed.")
    width, height = (float(match[1]) * (0.75 if match[2] == "px" else 1) for match in found)
    return width, height


def _clean(root: ElementTree.Element, name: str) -> None:
    """Drop namespaces and descriptions, own all ids and rules, refuse what runs or loads."""
    ids = {element.get("id"): f"{name}-{element.get('id')}" for element in root.iter() if element.get("id")}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.removeprefix(_SVG) in _DROPPED:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.tag in _REFUSED or "{" in element.tag:
            raise ValueError(f"figure {name}: it holds a {element.tag!r} element; a page takes plain drawings only.")
        element.attrib = dict(_attributes(element, ids, name))
        if element.tag == "style":
            element.text = _own_rules(element.text or "", name)


def _attributes(element: ElementTree.Element, ids: Mapping[str, str], name: str):
    """Attributes of an element with the ids of its figure."""
    for key, value in element.attrib.items():
        if key == _HREF or key == "href":
            if value.startswith("#"):
                value = f"#{ids.get(value[1:], value[1:])}"
            elif not value.startswith("data:image/png;base64,"):
                raise ValueError(f"figure {name}: it refers to {value[:80]!r}; a page loads nothing.")
            key = "href"
        elif key.startswith(("on", "{")):
            raise ValueError(f"figure {name}: attribute {key!r}; a page takes plain drawings only.")
        elif key == "id":
            value = ids[value]
        elif "url(" in value:
            value = _URL.sub(lambda found: f"url(#{ids.get(found[1], found[1])})", value)
            if re.search(r"url\((?!#)", value):
                raise ValueError(f"figure {name}: {key}={value[:80]!r}; a page loads nothing.")
        yield key, value.replace(GREY, "currentColor")


def _own_rules(style: str, name: str) -> str:
    """Make each rule of a style hold inside its figure alone."""
    if "@" in style or "url(" in style or "<" in style:
        raise ValueError(f"figure {name}: style {style[:80]!r}; plain rules are taken only.")
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", style)
    return "".join(
        f"{', '.join(f'#{name} {part.strip()}' for part in selectors.split(','))} {{{body}}}\n"
        for selectors, body in rules
    )
