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
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import mean

from finetune.published import TASKS, paper_table, table_numbers
from finetune.report.paper import printed
from finetune.report.paper.layouts import GLUE_TABLES, K_TABLES

AVERAGE = "AVG"
FOLLOWS = "follows"
CUT_OFF = "follows only if cut off"
CONTRADICTED = "does not follow"
IMPLAUSIBLE = "follows only with an odd cell"
UNDECIDED = "cannot be told"
VERDICTS = (CONTRADICTED, IMPLAUSIBLE, CUT_OFF, UNDECIDED, FOLLOWS)

Row = Mapping[str, Mapping[str, str]]
"""Column -> cell, of the printed tasks and the average."""

Place = tuple[int, str]
"""(table, row label)."""

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
        printed: The average as printed.
        verdict: One of `VERDICTS`; `IMPLAUSIBLE` says that one cell is not printed and would have to lie outside
            everything printed for its model and task.
        mean: Mean of the printed cells; `None` where one is missing.
        low: Least exact mean that the rounded cells allow; `None` where one is missing.
        high: Largest one.
        readings: Ways of printing by cutting off that would explain the average.
        missing: Labels of the tasks without a printed cell.
        implied: Where the one missing cell would have to lie.
        elsewhere: Least and largest printed value of that model and task in other rows.
        twin: Another table's row of the model with the same cells and deviations, such as `table 9, SparseGrad`.
        twin_value: What it prints for the missing task.
        repeats: Whether the twin stands in an earlier table: this row is that one, printed again.
    """

    table: int
    row: str
    printed: str
    verdict: str = UNDECIDED
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    readings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    implied: tuple[float, float] | None = None
    elsewhere: tuple[float, float] | None = None
    twin: str | None = None
    twin_value: str | None = None
    repeats: bool = False


def check_averages(tables: Mapping[int, Iterable[Mapping[str, str]]] | None = None) -> list[AverageCheck]:
    """Check every printed average of the paper's tables.

    Args:
        tables: Number -> cells as `published.paper_table` gives them; `None` takes all tables on file.

    Returns:
        One check for each row with a printed average and printed cells of tasks, in the order of the tables.
    """
    given = {number: paper_table(number) for number in table_numbers()} if tables is None else tables
    rows = {(number, label): row for number, cells in given.items() for label, row in _rows(cells).items()}
    return [_check(place, rows) for place in rows]


def counts(checks: Iterable[AverageCheck]) -> dict[str, int]:
    """Count verdicts over distinct rows: verdict -> number, without the rows that repeat another table's."""
    found = [check.verdict for check in checks if not check.repeats]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def _rows(cells: Iterable[Mapping[str, str]]) -> dict[str, Row]:
    """The rows with a printed average and at least two printed tasks; cells that are not printed are left out."""
    rows: dict[str, dict[str, Mapping[str, str]]] = {}
    for cell in cells:
        if cell["column"] in (AVERAGE, *TASKS.values()) and cell["source"] == "arxiv_pdf" and cell["value"]:
            rows.setdefault(cell["row"], {})[cell["column"]] = cell
    return {label: row for label, row in rows.items() if AVERAGE in row and len(row) > 2}


def _check(place: Place, rows: Mapping[Place, Row]) -> AverageCheck:
    average = rows[place][AVERAGE]["value"]
    known = {column: cell["value"] for column, cell in rows[place].items() if column != AVERAGE}
    missing = tuple(label for label in TASKS.values() if label not in known)
    twin = _twin(place, rows)
    found = AverageCheck(*place, average, missing=missing)
    if twin is not None:
        found = replace(found, twin=f"table {twin[0]}, {twin[1]}", repeats=twin[0] < place[0])
    if len(missing) > 1:
        return found
    if missing:
        return _with_missing(found, [*known.values()], rows[twin] if twin else {}, rows)
    spans = {rounded: _mean([_span(value, rounded) for value in known.values()]) for rounded in (True, False)}
    readings = tuple(name for (c, a), name in _READINGS.items() if spans[c].meets(_span(average, a)))
    follows = spans[True].meets(_span(average, True))
    return replace(
        found,
        verdict=FOLLOWS if follows else CUT_OFF if readings else CONTRADICTED,
        mean=float(sum(map(_exact, known.values())) / len(known)),
        low=float(spans[True].low),
        high=float(spans[True].high),
        readings=() if follows else readings,
    )


def _with_missing(found: AverageCheck, known: Sequence[str], twin: Row, rows: Mapping[Place, Row]) -> AverageCheck:
    """Where the one missing cell would have to lie, and what speaks against it."""
    total, spans = _span(found.printed, True), [_span(value, True) for value in known]
    low = total.low * len(TASKS) - sum(span.high for span in spans)
    implied = Span(low, total.high * len(TASKS) - sum(span.low for span in spans))
    label, model = found.missing[0], _MODELS.get(found.table)
    others = [row[label]["value"] for (table, _), row in rows.items() if _MODELS.get(table) == model and label in row]
    others = others if model else []
    verdict, twin_value = UNDECIDED, twin[label]["value"] if label in twin else None
    if twin_value is not None:
        verdict = FOLLOWS if implied.meets(_span(twin_value, True)) else CONTRADICTED
    elif others and not implied.meets(_hull(others)):
        verdict = IMPLAUSIBLE
    return replace(
        found,
        verdict=verdict,
        implied=(float(implied.low), float(implied.high)),
        elsewhere=(float(min(map(_exact, others))), float(max(map(_exact, others)))) if others else None,
        twin_value=twin_value,
    )


def _twin(place: Place, rows: Mapping[Place, Row]) -> Place | None:
    """The first row of another table of the same model whose cells and deviations are all as in this one."""
    model, row = _MODELS.get(place[0]), rows[place]
    for other, cells in rows.items():
        if model is None or _MODELS.get(other[0]) != model or other[0] == place[0]:
            continue
        both = [column for column in row if column in cells]
        same = all(row[name][what] == cells[name][what] for name in both for what in ("value", "std"))
        if same and len(both) >= min(len(row), len(cells)):
            return other
    return None


def _exact(value: str) -> Fraction:
    return Fraction(printed.parse(value).number)


def _span(value: str, rounded: bool) -> Span:
    """What a printed number may have been."""
    exact, unit = _exact(value), Fraction(printed.parse(value).digit)
    return Span(exact - unit / 2, exact + unit / 2) if rounded else Span(exact, exact + unit, open=True)


def _mean(spans: Sequence[Span]) -> Span:
    return Span(mean(span.low for span in spans), mean(span.high for span in spans), spans[0].open)


def _hull(values: Sequence[str]) -> Span:
    spans = [_span(value, True) for value in values]
    return Span(min(span.low for span in spans), max(span.high for span in spans))
