"""Methods against each other on the same tasks and seeds: scores, the authors' logs and losses through the same code.

A family's primary result is the difference of the means over tasks; the tasks one by one are corrected over all pairs
and tasks of the family. A pair uses the tasks and seeds that both methods have. The test of scores flips signs. At the
three seeds of a decoder that can separate nothing, so losses take the paired t test, which trusts that their
differences are normal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from finetune.published import TASKS, released_scores
from finetune.report.evidence.evidence import Evidence
from finetune.report.paper.layouts import METHODS
from finetune.report.statistics.families import Design, Family, families_of
from finetune.stats import paired, verdicts
from finetune.stats.intervals import Difference, Estimate, bootstrap, mean_interval, mean_over_tasks

Scores = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Method -> task -> seed -> score in percent."""

Differences = dict[str, list[float]]
"""Task -> paired differences by ascending seed."""


@dataclass(frozen=True)
class Summary:
    """The runs of one method.

    Attributes:
        tasks: Task -> mean over seeds with a t interval.
        mean: Mean of the tasks' means, stratified bootstrap.
        iqm: Interquartile mean of all runs, likewise; `None` below `paired.LEAST_FOR_IQM` runs. Where tasks differ in
            difficulty it drops the easiest and the hardest ones (rliable normalises scores first).
    """

    tasks: Mapping[str, Estimate]
    mean: Estimate
    iqm: Estimate | None


@dataclass(frozen=True)
class Test:
    """A paired difference with its test.

    Attributes:
        difference: Mean paired difference in points (losses: in nats a token), t interval.
        p: Two-sided p-value; `None` where no test is possible, a t test of one pair.
        p_holm: The same, corrected for the family.
        least: Smallest p-value that so many pairs allow; `None` for a t test.
        verdict: `first is better`, `second is better` or `not separated`, by `p_holm` (`verdicts.of_test`).
    """

    difference: Difference
    pairs: int
    p: float | None
    p_holm: float | None
    least: float | None
    verdict: str


@dataclass(frozen=True)
class Pair:
    """Two methods, the first minus the second.

    Attributes:
        tasks: Task -> test over seeds.
        mean: Test over all tasks, which weigh the same.
        bootstrap: The same difference with a stratified bootstrap's interval (rliable).
        iqm: Interquartile mean of the paired differences; `None` below `paired.LEAST_FOR_IQM` pairs.
        improvement: Probability that a run of the first beats one of the second (rliable).
        unpaired: Runs of either that have no partner.
    """

    first: str
    second: str
    tasks: Mapping[str, Test]
    mean: Test
    bootstrap: Estimate
    iqm: Estimate | None
    improvement: Estimate
    unpaired: int


@dataclass(frozen=True)
class Comparison:
    """Everything about the methods of one model: `methods` by name, and `families` of pairs."""

    methods: Mapping[str, Summary]
    families: tuple[Family, ...]


def scores_of_runs(evidence: Evidence, model: str) -> dict[str, dict[str, dict[int, float]]]:
    """Collect the scores of a model's finished runs."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for (name, method, task), runs in evidence.runs.items():
        if name == model:
            found.setdefault(method, {})[task] = {run.seed: run.score for run in runs}
    return found


def scores_of_logs(model: str) -> dict[str, dict[str, dict[int, float]]]:
    """Collect the scores of the authors' logs, without the seed of their search."""
    found = {m: {t: scores for t in TASKS if (scores := released_scores(model, m, t))} for m in METHODS.values()}
    return {method: tasks for method, tasks in found.items() if tasks}


def compare_methods(scores: Scores, design: Design, *, losses: bool = False) -> Comparison:
    """Summarise every method of one model and compare them in pairs.

    Args:
        scores: Of one model, in percent; or losses in nats a token.
        design: What is compared with what.
        losses: Whether lower is better, and the test is a t test.
    """
    ordered = {name: {task: tasks[task] for task in design.labels.in_order({*tasks})} for name, tasks in scores.items()}
    families = tuple(_compared(family, ordered, design, losses) for family in families_of(ordered, design))
    return Comparison({name: _summary(tasks, design) for name, tasks in ordered.items()}, families)


def _summary(tasks: Mapping[str, Mapping[int, float]], design: Design) -> Summary:
    runs = {task: [*found.values()] for task, found in tasks.items()}
    return Summary({task: mean_interval(found) for task, found in runs.items()}, *_averages(runs, design))


def _averages(values: Mapping[str, Sequence[float]], design: Design) -> tuple[Estimate, Estimate | None]:
    """The mean over tasks, and the interquartile mean where there are enough values; both by bootstrap."""
    enough = sum(map(len, values.values())) >= paired.LEAST_FOR_IQM
    drawn = partial(bootstrap, [*values.values()], seed=design.seed, samples=design.samples)
    return drawn(), drawn(iqm=True) if enough else None


def _compared(family: Family, scores: Scores, design: Design, losses: bool) -> Family:
    """Test all pairs, then correct: the means over tasks together, the single tasks together."""
    found = {pair: _differences(*(scores[method] for method in pair)) for pair in family.pairs}
    used = {pair: tasks for pair, tasks in found.items() if tasks}
    whole = _tests({pair: [*tasks.values()] for pair, tasks in used.items()}, design, losses)
    each = {(pair, task): [own] for pair, tasks in used.items() for task, own in tasks.items()}
    single = _tests(each, design, losses)
    pairs = []
    for pair, tasks in used.items():
        better = [[[*scores[method][task].values()] for task in tasks] for method in (pair[::-1] if losses else pair)]
        total = sum(len(seeds) for method in pair for seeds in scores[method].values())
        average, iqm = _averages(tasks, design)
        pairs.append(
            Pair(
                *pair,
                tasks={task: single[pair, task] for task in tasks},
                mean=whole[pair],
                bootstrap=average,
                iqm=iqm,
                improvement=paired.probability_of_improvement(*better, seed=design.seed, samples=design.samples),
                unpaired=total - 2 * whole[pair].pairs,
            )
        )
    return replace(family, pairs=tuple(pairs), left_out=tuple(pair for pair in found if pair not in used))


def _differences(first: Mapping[str, Mapping[int, float]], second: Mapping[str, Mapping[int, float]]) -> Differences:
    """First minus second at the seeds that both have, for the tasks with at least one."""
    shared = {task: sorted(first[task].keys() & second[task].keys()) for task in first if task in second}
    return {task: [first[task][s] - second[task][s] for s in seeds] for task, seeds in shared.items() if seeds}


def _tests(differences: Mapping[Any, Sequence[Sequence[float]]], design: Design, losses: bool) -> dict[Any, Test]:
    """Test several mean differences and correct them together."""
    means = {key: mean_over_tasks(tasks) for key, tasks in differences.items()}
    ps, least = {key: mean.p for key, mean in means.items()}, {}
    if not losses:
        options = {"seed": design.seed, "samples": 10 * design.samples}
        flips = {key: paired.sign_flip_test(tasks, **options) for key, tasks in differences.items()}
        ps, least = ({key: getattr(one, name) for key, one in flips.items()} for name in ("p", "least"))
    tested = {key: p for key, p in ps.items() if p is not None}
    corrected = dict(zip(tested, paired.holm([*tested.values()]), strict=True))
    found = {}
    for key, mean in means.items():
        p_holm, pairs = corrected.get(key), sum(map(len, differences[key]))
        verdict = verdicts.of_test(mean.value, p_holm, lower_is_better=losses)
        found[key] = Test(mean, pairs, ps[key], p_holm, least.get(key), verdict)
    return found
