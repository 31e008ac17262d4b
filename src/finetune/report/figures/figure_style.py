"""The look of every figure, and how one is kept: SVG, PNG and a JSON of words.

Drawn without pyplot, so that no global state of matplotlib is touched. Texts and axes are a mid grey and the
background is transparent: a page may be light or dark. Colours are those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), which readers with any colour vision tell apart. A rerun gives the same bytes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.store import records
from finetune.store.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#6b7280"
"""Texts, axes and reference lines: 4.8 to 1 on white, 3.9 to 1 on near black."""

COLOURS = {
    "full": "#56b4e9",
    "lora": "#e69f00",
    "meprop": "#cc79a7",
    "sparsegrad": "#009e73",
    "rotated": "#0072b2",
    "truncated": "#d55e00",
    "control": GREY,
}
"""Method or form -> its colour in every figure; the folded form is SparseGrad's default and has its colour."""

_MORE = ("#8a63d2", "#8c6d31", "#a3a500", "#b5396b", "#3f7f93")
"""Colours of what has none of its own, in turn."""

_MARKERS = "os^DvPX*<>hpd"

SEQUENTIAL = "cividis"
"""Colour map of magnitudes: the same to readers with and without red-green vision."""

DPI = 160

_STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that a PNG is the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY
    ),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # texts stay texts: found, copied and read aloud
    "svg.hashsalt": "sparsegrad",  # ids of clip paths are random without it
}


class Mark(NamedTuple):
    """How a form or a space is drawn; the names are matplotlib's. Markers tell it apart without colour too."""

    label: str
    color: str
    marker: str


@dataclass(frozen=True)
class Words:
    """What a page prints around a figure.

    Attributes:
        title: One line.
        caption: What is shown, on what device, at what sizes.
        notes: Sentences: what is missing, what to be careful with.
        source: Paths of the records that it is drawn from.
    """

    title: str
    caption: str
    notes: tuple[str, ...] = ()
    source: tuple[str, ...] = ()


def styles(names: Iterable[str], kin: Mapping[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """Colour and marker of each name of a figure, in its order.

    Args:
        names: Methods or variants; as many as there are.
        kin: Name -> the method or form whose colour it has where it has none of its own.

    Returns:
        Name -> (colour, marker). A name without colour or kin takes the next of a cycle; markers are given in turn.
    """
    names, kin = list(dict.fromkeys(names)), kin or {}
    more, markers = itertools.cycle(_MORE), itertools.cycle(_MARKERS)
    return {name: (COLOURS.get(name) or COLOURS.get(kin.get(name, "")) or next(more), next(markers)) for name in names}


@contextmanager
def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """A figure in the common style, of a size in inches; draw and save it inside the ``with``.

    The options are those of ``Figure.subplots``. Yields the figure and its axes, an array ``(rows, columns)``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def band(axis: Any, xs: Sequence[float], lines: Sequence[Sequence[float]], alpha: float, **line: Any) -> None:
    """A line of the middle values with a shade from the lower to the upper ones: `lines` are these three."""
    low, middle, high = lines
    axis.plot(xs, middle, **line)
    axis.fill_between(xs, low, high, color=line["color"], alpha=alpha, linewidth=0)


def legend_below(figure: Figure, *axes: Any, columns: int = 3) -> None:
    """One legend below the panels, of what the given axes name."""
    found = [axis.get_legend_handles_labels() for axis in axes]
    handles, labels = (list(itertools.chain.from_iterable(part)) for part in zip(*found, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def rows_of_dots(axis: Any, labels: Sequence[str]) -> None:
    """Make a panel a list of labels from the top, for dots with intervals at 0, 1, 2, ..."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)


def draw_svg(figure: Figure) -> bytes:
    """The figure of :func:`new_figure`, still inside its ``with``, as an SVG of fixed bytes.

    It is laid out once, on a grid: the solver's last digits vary, and ids in an SVG are hashes of places.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(float(value), 5) for value in axes.get_position(original=True).bounds])
    return _drawn(figure, "svg", Date=None, Creator=None)


def save_figure(figure: Figure, folder: str | Path, name: str, words: Words) -> list[Path]:
    """Write ``<name>.svg``, ``<name>.png`` and ``<name>.json`` (the words), each whole or not at all.

    The figure is that of :func:`new_figure`, still inside its ``with``.

    Returns:
        The three paths.

    Raises:
        ValueError: if title, caption or sources are empty.
    """
    if not words.title or not words.caption or not words.source:
        raise ValueError(f"{name}: title, caption and at least one source are needed, got {words}.")
    svg, png, json = (Path(folder) / f"{name}.{suffix}" for suffix in ("svg", "png", "json"))
    write_atomically(svg, draw_svg(figure))
    write_atomically(png, _drawn(figure, "png", Software=None))
    records.write_json(json, asdict(words))
    return [svg, png, json]


def _drawn(figure: Figure, kind: str, **metadata: None) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata, transparent=True)
    return buffer.getvalue()


def number(value: float) -> str:
    """A value for a label: three significant digits, thousands separated, no exponent."""
    return f"{value:,.0f}" if value == 0 or abs(value) >= 100 else f"{value:.3g}"


def relative_paths(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Paths as they stand in ``Words.source``: with forward slashes, sorted, each once."""
    return tuple(sorted({Path(path).as_posix() for path in paths}))
