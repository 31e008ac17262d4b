"""The paper's GLUE cells against the authors' own per-seed logs: same runs, other runs, or the other method's?

For two methods 1 and 2 on one task, with printed means `p`, logged means `l`, `n_p` and `n_l` runs behind them and one
variance `s²` pooled over all four samples (v_j = s² (1 / n_p + 1 / n_lj), plus u² / 12 for printing with last digit u):

    as printed    A = (p1 - l1)² / v1 + (p2 - l2)² / v2
    exchanged     B = (p1 - l2)² / v2 + (p2 - l1)² / v1
    evidence      (A - B) / 2 nats for "the two printed cells are exchanged"; at equal n it is -(p1 - p2)(l1 - l2) / v

so an exchange fits better whenever print and logs order the two methods differently. Without an exchange that happens
by chance: if the methods do not differ, in half of the tasks. `p_chance` is how often evidence as large arises when
print and logs are independent runs of two methods that do not differ (the case in which it arises most often); it is
drawn with the same numbers of runs, and corrected (Holm) over all tasks and models of the pair.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as distributions

from finetune.published import TASKS, released_scores
from finetune.report.paper.layouts import GLUE_TABLES, PAPER_RUNS, printed_places
from finetune.stats import paired
from finetune.stats.intervals import sample_std
from finetune.stats.verdicts import LEVEL

ROUNDED, CUT, OTHER = "rounded", "cut off", "other"
EXCHANGED = "looks exchanged"
BY_CHANCE = "fits better exchanged, but not beyond chance"
NOT_EXCHANGED = "does not look exchanged"

SEEDS = {"roberta_large": (42, 3705, 2023)}
"""Seeds behind the print where the logs hold more: the large model's printed means are those of the three seeds that
the released run script has, as the text says (D15); the base models' are those of all five."""

LOGGED = ("sparsegrad", "lora", "full")
"""Methods with logs, in the order of a pair."""


@dataclass(frozen=True)
class PrintedCell:
    """A printed score beside the logs of its method.

    Attributes:
        printed: Printed mean, percent.
        printed_std: Printed deviation; `None` where there is none.
        unit: A unit of the last printed digit.
        logged: Scores of the logs, of `SEEDS` where they hold more.
        match: `rounded` if the logs' mean prints like that, `cut off` if only cutting gives it, else `other`.
        cut_off: Whether the logs' mean cut off prints like that.
    """

    model: str
    method: str
    task: str
    printed: float
    printed_std: float | None
    unit: float
    logged: tuple[float, ...]
    match: str
    cut_off: bool

    @property
    def mean(self) -> float:
        """Mean of the logged scores."""
        return float(np.mean(self.logged))

    @property
    def std(self) -> float:
        """Population standard deviation of the logged scores, as the paper prints it."""
        return float(np.std(self.logged))


@dataclass(frozen=True)
class Exchange:
    """Whether two printed cells fit the logs better exchanged.

    Attributes:
        printed: The printed means of the two methods.
        logged: Their logged means; `printed_std` and `logged_std` likewise their deviations.
        distance: Σ |printed - logged| as printed, in points.
        distance_exchanged: The same with the two printed cells exchanged.
        evidence: Log-likelihood of exchanged minus as printed, nats.
        p_chance: How often evidence as large arises without an exchange, at most.
        p_holm: The same, corrected over all tasks and models of the pair.
        verdict: `EXCHANGED`, `BY_CHANCE` or `NOT_EXCHANGED`, by `evidence` and `p_holm`.
        stds_as_printed: Whether the printed deviations fit the logs' better as printed; `None` where one is missing.
        copies: How many of the two printed cells are their own method's logged mean, rounded.
        copies_exchanged: How many are the other method's.
    """

    model: str
    task: str
    methods: tuple[str, str]
    printed: tuple[float, float]
    logged: tuple[float, float]
    printed_std: tuple[float | None, float | None]
    logged_std: tuple[float, float]
    distance: float
    distance_exchanged: float
    evidence: float
    p_chance: float
    p_holm: float
    verdict: str
    stds_as_printed: bool | None
    copies: int
    copies_exchanged: int


def printed_cells(model: str) -> list[PrintedCell]:
    """List the printed scores of a model (a key of `layouts.GLUE_TABLES`) that have logs."""
    found = []
    for place in printed_places(GLUE_TABLES[model]):
        scores = released_scores(model, place.method, place.task) if place.paper and place.quantity == "score" else {}
        logged = tuple(scores[seed] for seed in SEEDS.get(model, scores) if seed in scores)
        if not logged or not place.source.startswith("arxiv_pdf"):
            continue
        value, mean = place.number, float(np.mean(logged))
        cut_off = value.truncate(mean).number == value.number
        match = ROUNDED if value.round(mean).number == value.number else CUT if cut_off else OTHER
        numbers = (value.value, place.deviation, 2 * value.rounding)
        found.append(PrintedCell(model, place.method, place.task, *numbers, logged, match, cut_off))
    return found


def counts(cells: Iterable[PrintedCell]) -> dict[str, int]:
    """Count matches: `rounded`, `cut_off` (only so), `other`, and `rounded_alone`, which cutting off contradicts."""
    found = [(cell.match, cell.cut_off) for cell in cells]
    by_match = {name.replace(" ", "_"): sum(match == name for match, _ in found) for name in (ROUNDED, CUT, OTHER)}
    return by_match | {"rounded_alone": found.count((ROUNDED, False))}


def exchanges(pair: tuple[str, str], *, seed: int = 0) -> list[Exchange]:
    """Ask of every task and model whether the printed cells of two methods look exchanged."""
    couples = [couple for model in GLUE_TABLES for couple in _couples(printed_cells(model), pair)]
    evidence = [_evidence(first, second) for first, second in couples]
    chances = [
        _chance(found, (PAPER_RUNS[first.model], len(first.logged), len(second.logged)), seed)
        for found, (first, second) in zip(evidence, couples, strict=True)
    ]
    numbers = zip(couples, evidence, chances, paired.holm(chances), strict=True)
    return [_exchange(first, second, *others) for (first, second), *others in numbers]


def exchange_counts() -> list[dict[str, Any]]:
    """Count, for every two methods and every model, the tasks that fit better exchanged.

    Returns:
        `model`, `methods`, the numbers `better` and `tasks`, and `p`, the chance of at least so many if each task had
        probability 1/2.
    """
    found = []
    for pair, model in itertools.product(itertools.combinations(LOGGED, 2), GLUE_TABLES):
        own = [_evidence(first, second) for first, second in _couples(printed_cells(model), pair)]
        better = sum(value > 1e-9 for value in own)  # equal prints give 0, up to rounding
        p = float(distributions.binomtest(better, len(own), alternative="greater").pvalue)
        found.append({"model": model, "methods": pair, "better": better, "tasks": len(own), "p": p})
    return found


def averages_with(exchanged: Iterable[str], model: str, pair: tuple[str, str]) -> dict[str, tuple[float, float, float]]:
    """Method -> mean of its printed cells, the same with the cells of some tasks exchanged, and the logs' mean.

    The model needs print and logs of all tasks.
    """
    cells = {(cell.method, cell.task): cell for cell in printed_cells(model)}
    moved, other = set(exchanged), {pair[0]: pair[1], pair[1]: pair[0]}
    return {
        method: (
            float(np.mean([cells[method, task].printed for task in TASKS])),
            float(np.mean([cells[other[method] if task in moved else method, task].printed for task in TASKS])),
            float(np.mean([cells[method, task].mean for task in TASKS])),
        )
        for method in pair
    }


def _couples(cells: Iterable[PrintedCell], pair: tuple[str, str]) -> list[tuple[PrintedCell, PrintedCell]]:
    found = {(cell.method, cell.task): cell for cell in cells}
    tasks = [task for method, task in found if method == pair[0] and (pair[1], task) in found]
    return [(found[pair[0], task], found[pair[1], task]) for task in tasks]


def _evidence(first: PrintedCell, second: PrintedCell) -> float:
    """The evidence of the module's docstring, in nats."""
    n = PAPER_RUNS[first.model]
    sums = [(float(np.var(cell.logged)) * len(cell.logged), len(cell.logged) - 1) for cell in (first, second)]
    printed_stds = [cell.printed_std for cell in (first, second) if cell.printed_std is not None]
    sums += [(sample_std(std, n) ** 2 * (n - 1), n - 1) for std in printed_stds]
    variance = sum(square for square, _ in sums) / sum(freedom for _, freedom in sums)
    v = [variance * (1 / n + 1 / len(cell.logged)) + cell.unit**2 / 12 for cell in (first, second)]
    return _ratio(first.printed, second.printed, first.mean, second.mean, *v)


def _ratio(p1, p2, l1, l2, v1, v2):
    return ((p1 - l1) ** 2 / v1 + (p2 - l2) ** 2 / v2 - (p1 - l2) ** 2 / v2 - (p2 - l1) ** 2 / v1) / 2


def _chance(evidence: float, runs: tuple[int, int, int], seed: int, samples: int = 200_000) -> float:
    """Share of draws without an exchange, and without a difference, whose evidence is as large.

    `runs`: behind a printed mean, and behind the two logged ones. The observed evidence counts as one draw more.
    """
    n, *logs = runs
    generator = np.random.default_rng(seed)
    p1, p2 = generator.standard_normal((2, samples)) / np.sqrt(n)
    l1, l2 = (generator.standard_normal(samples) / np.sqrt(count) for count in logs)
    freedom = 2 * (n - 1) + sum(logs) - 2
    variance = generator.chisquare(freedom, samples) / freedom
    v1, v2 = (variance * (1 / n + 1 / count) for count in logs)
    extreme = int(np.count_nonzero(_ratio(p1, p2, l1, l2, v1, v2) >= evidence))
    return (extreme + 1) / (samples + 1)


def _exchange(first: PrintedCell, second: PrintedCell, evidence: float, chance: float, corrected: float) -> Exchange:
    cells = (first, second)
    prints, means = np.array([cell.printed for cell in cells]), np.array([cell.mean for cell in cells])
    stds = np.array([cell.printed_std or np.nan for cell in cells])
    logged_stds = np.array([cell.std for cell in cells])
    digits = [round(-np.log10(cell.unit)) for cell in cells]
    crossed = [round(mean, place) for mean, place in zip(means[::-1], digits, strict=True)]
    as_printed = None
    if not np.isnan(stds).any() and all(logged_stds):
        apart, exchanged = (np.abs(np.log(stds / found)).sum() for found in (logged_stds, logged_stds[::-1]))
        as_printed = bool(apart <= exchanged)
    return Exchange(
        model=first.model,
        task=first.task,
        methods=(first.method, second.method),
        printed=tuple(prints.tolist()),
        logged=tuple(means.tolist()),
        printed_std=(first.printed_std, second.printed_std),
        logged_std=tuple(logged_stds.tolist()),
        distance=float(np.abs(prints - means).sum()),
        distance_exchanged=float(np.abs(prints - means[::-1]).sum()),
        evidence=evidence,
        p_chance=chance,
        p_holm=corrected,
        verdict=NOT_EXCHANGED if evidence <= 0 else EXCHANGED if corrected <= LEVEL else BY_CHANCE,
        stds_as_printed=as_printed,
        copies=sum(cell.match == ROUNDED for cell in cells),
        copies_exchanged=int((np.abs(prints - crossed) < [cell.unit / 4 for cell in cells]).sum()),
    )
