"""Which printed averages do not follow from their rows, by interval arithmetic on what printing loses.

A cell printed as `c` with a last digit worth `u` was, before printing,

    rounded     in [c - u/2, c + u/2]       both ends: which way a half goes is not known
    cut off     in [c, c + u)

so the exact mean of a row lies in the mean of the intervals of its cells, and the printed average follows if that meets
its own interval. Rounding of both is the rule; cutting off is looked at separately. Cells that the paper does not
print (`unknown`, or `inferred` by a reader) are no evidence: with one missing, the row tells where it would lie,

    missing     in T [average] - Σ [known cells]

and that is held against the same row where another table prints it in full, and against the range of what is printed
for that model and task elsewhere. Arithmetic is exact (decimal fractions).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from finetune.published import TASKS, paper_table, table_numbers
from finetune.report.paper import printed
from finetune.report.paper.layouts import GLUE_TABLES, K_TABLES

AVERAGE = "AVG"
FOLLOWS = "follows"
CUT_OFF = "follows only if cut off"
CONTRADICTED = "does not follow"
IMPLAUSIBLE = "follows only with an odd cell"
UNDECIDED = "cannot be told"

_READINGS = {(True, False): "cells rounded, average cut off", (False, True): "cells cut off, average rounded"}
_READINGS[False, False] = "cells and average cut off"
_MODELS = {table: model for model, table in GLUE_TABLES.items()} | K_TABLES


@dataclass(frozen=True)
class Span:
    """An interval of exact numbers, closed below; `open` tells whether its upper end is left out."""

    low: Fraction
    high: Fraction
    open: bool = False

    def meets(self, other: "Span") -> bool:
        """Whether the two have a number in common."""
        first, second = (self, other) if self.low <= other.low else (other, self)
        return second.low < first.high or (second.low == first.high and not first.open)


@dataclass(frozen=True)
class AverageCheck:
    """One printed average against its row.

    Attributes:
        table: Number of the table.
        row: Row label as printed.
        printed: The average as printed.
        verdict: `follows`, `follows only if cut off`, `does not follow`, `follows only with an odd cell` (one cell is
            not printed and would have to lie outside everything printed for its model and task) or `cannot be told`.
        mean: Mean of the printed cells; `None` where one is missing.
        low: Least exact mean that the rounded cells allow; `None` where one is missing.
        high: Largest one.
        readings: Ways of printing by cutting off that would explain the average.
        missing: Labels of the tasks without a printed cell.
        implied: Where the one missing cell would have to lie.
        elsewhere: Least and largest printed value of that model and task in other rows.
        twin: Another table's row with the same cells that prints the missing one, such as `table 9, SparseGrad`.
        twin_value: What it prints there.
    """

    table: int
    row: str
    printed: str
    verdict: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    readings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    implied: tuple[float, float] | None = None
    elsewhere: tuple[float, float] | None = None
    twin: str | None = None
    twin_value: str | None = None


def check_averages(tables: Mapping[int, Iterable[Mapping[str, str]]] | None = None) -> list[AverageCheck]:
    """Check every printed average of the paper's tables.

    Args:
        tables: Number -> cells as `published.paper_table` gives them; `None` takes all tables on file.

    Returns:
        One check for each row with a printed average and printed cells of tasks, in the order of the tables.

    Raises:
        ValueError: If a cell is not a printed number.
    """
    given = {number: paper_table(number) for number in table_numbers()} if tables is None else tables
    rows = {(number, label): row for number, cells in given.items() for label, row in _rows(cells).items()}
    return [_check(place, row, rows) for place, row in rows.items()]


def twins(tables: Mapping[int, Iterable[Mapping[str, str]]] | None = None) -> list[tuple[str, str]]:
    """Find the rows that repeat a row of another table of the same model, every printed cell and deviation alike.

    Args:
        tables: As in `check_averages`.

    Returns:
        Pairs such as `("table 11, 100", "table 9, SparseGrad")`, the later table first.
    """
    given = {number: paper_table(number) for number in table_numbers()} if tables is None else tables
    rows = {(number, label): row for number, cells in given.items() for label, row in _rows(cells).items()}
    pairs = [(place, _twin(place, row, rows)) for place, row in rows.items()]
    return [(_name(place), _name(found)) for place, found in pairs if found is not None and found[0] < place[0]]


Row = Mapping[str, Mapping[str, str]]
"""Column -> cell, of the printed tasks and the average."""

Place = tuple[int, str]
"""(table, row label)."""


def _rows(cells: Iterable[Mapping[str, str]]) -> dict[str, Row]:
    """The rows with a printed average and at least two printed tasks; cells that are not printed are left out."""
    rows: dict[str, dict[str, Mapping[str, str]]] = {}
    for cell in cells:
        if cell["column"] in (AVERAGE, *TASKS.values()) and cell["source"] == "arxiv_pdf" and cell["value"]:
            rows.setdefault(cell["row"], {})[cell["column"]] = cell
    return {label: row for label, row in rows.items() if AVERAGE in row and len(row) > 2}


def _check(place: Place, row: Row, rows: Mapping[Place, Row]) -> AverageCheck:
    average = row[AVERAGE]["value"]
    known = {column: cell["value"] for column, cell in row.items() if column != AVERAGE}
    missing = tuple(label for label in TASKS.values() if label not in known)
    if missing:
        return _with_missing(place, average, known, missing, rows)
    spans = {rounded: _mean([_span(value, rounded) for value in known.values()]) for rounded in (True, False)}
    readings = [name for (c, a), name in _READINGS.items() if spans[c].meets(_span(average, a))]
    follows = spans[True].meets(_span(average, True))
    cells = [_exact(value) for value in known.values()]
    return AverageCheck(
        *place,
        average,
        FOLLOWS if follows else CUT_OFF if readings else CONTRADICTED,
        mean=float(sum(cells) / len(cells)),
        low=float(spans[True].low),
        high=float(spans[True].high),
        readings=() if follows else tuple(readings),
    )


def _with_missing(
    place: Place, average: str, known: Mapping[str, str], missing: tuple[str, ...], rows: Mapping[Place, Row]
) -> AverageCheck:
    """Where the one missing cell would have to lie, and what speaks against it."""
    if len(missing) > 1:
        return AverageCheck(*place, average, UNDECIDED, missing=missing)
    total, spans = _span(average, True), [_span(value, True) for value in known.values()]
    low = total.low * len(TASKS) - sum(span.high for span in spans)
    implied = Span(low, total.high * len(TASKS) - sum(span.low for span in spans))
    label = missing[0]
    twin = _twin(place, rows[place], rows)
    twin_value = rows[twin][label]["value"] if twin is not None and label in rows[twin] else None
    model = _MODELS.get(place[0])
    others = [row[label]["value"] for (table, _), row in rows.items() if _MODELS.get(table) == model and label in row]
    verdict = UNDECIDED
    if twin_value is not None:
        verdict = FOLLOWS if implied.meets(_span(twin_value, True)) else CONTRADICTED
    elif others and model and not any(implied.meets(span) for span in [_hull(others)]):
        verdict = IMPLAUSIBLE
    elsewhere = (float(min(map(_exact, others))), float(max(map(_exact, others)))) if others and model else None
    found = {"twin": _name(twin) if twin is not None else None, "twin_value": twin_value, "elsewhere": elsewhere}
    return AverageCheck(
        *place, average, verdict, missing=missing, implied=(float(implied.low), float(implied.high)), **found
    )


def _twin(place: Place, row: Row, rows: Mapping[Place, Row]) -> Place | None:
    """The first row of another table of the same model whose cells and deviations are all as in this one."""
    model = _MODELS.get(place[0])
    for other, cells in rows.items():
        same_model = model is not None and _MODELS.get(other[0]) == model and other[0] != place[0]
        both = [column for column in row if column in cells]
        shared = len(both) >= min(len(row), len(cells))
        if same_model and shared and all(_print(row[column]) == _print(cells[column]) for column in both):
            return other
    return None


def _print(cell: Mapping[str, str]) -> tuple[str, str]:
    return cell["value"], cell["std"]


def _name(place: Place) -> str:
    return f"table {place[0]}, {place[1]}"


def _exact(value: str) -> Fraction:
    number = printed.parse(value)
    if number is None:
        raise ValueError("an empty cell is no printed number; leave it out")
    return Fraction(number.number)


def _span(value: str, rounded: bool) -> Span:
    """What a printed number may have been."""
    exact = _exact(value)
    unit = Fraction(10) ** int(printed.parse(value).number.as_tuple().exponent)
    return Span(exact - unit / 2, exact + unit / 2) if rounded else Span(exact, exact + unit, open=True)


def _mean(spans: Sequence[Span]) -> Span:
    low, high = (sum(getattr(span, end) for span in spans) / len(spans) for end in ("low", "high"))
    return Span(low, high, spans[0].open)


def _hull(values: Sequence[str]) -> Span:
    spans = [_span(value, True) for value in values]
    return Span(min(span.low for span in spans), max(span.high for span in spans))
