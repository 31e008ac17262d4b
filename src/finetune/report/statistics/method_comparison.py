"""Methods against each other on the same tasks and seeds: our runs and the authors' logs through the same code.

Pairs are compared in families, each with its own Holm correction: the four methods with each other; every variant with
the method that it varies, and with the variant whose name it extends (`truncated_refreshed`: `truncated`); every method
with a control that leaves the MLP matrices alone; and a change that was made to several methods alike (`full_mlp`,
`lora_mlp`, ...) among themselves. A family's primary result is the difference of the means over tasks; the tasks one by
one are corrected over all pairs and tasks of the family. A pair uses the tasks and seeds that both methods have.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.published import TASKS, released_scores
from finetune.report.evidence.evidence import Evidence
from finetune.report.paper.layouts import METHODS
from finetune.stats import paired, verdicts
from finetune.stats.intervals import Difference, Estimate, bootstrap, mean_interval, mean_over_tasks

Scores = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Method -> task -> seed -> score in percent."""

ORDER = ("sparsegrad", "lora", "meprop", "full")
"""A pair's difference is the earlier one's minus the later one's."""


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
        difference: Mean paired difference in points, t interval.
        pairs: Number of pairs behind it.
        p: Two-sided p-value of the sign-flip test.
        p_holm: The same, corrected for the family.
        least: Smallest p-value that so many pairs allow.
        verdict: `first is better`, `second is better` or `not separated`, by `p_holm` (`verdicts.of_test`).
    """

    difference: Difference
    pairs: int
    p: float
    p_holm: float
    least: float
    verdict: str


@dataclass(frozen=True)
class Pair:
    """Two methods, the first minus the second.

    Attributes:
        first: Method.
        second: Method.
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
class Family:
    """Pairs that are corrected together.

    Attributes:
        name: Such as `methods`.
        pairs: The comparisons.
        left_out: Pairs without a task and seed in common.
    """

    name: str
    pairs: tuple[Pair, ...]
    left_out: tuple[tuple[str, str], ...] = ()


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
    return {method: {task: tasks[task] for task in TASKS if task in tasks} for method, tasks in found.items()}


def scores_of_logs(model: str) -> dict[str, dict[str, dict[int, float]]]:
    """Collect the scores of the authors' logs, without the seed of their search."""
    found = {m: {t: scores for t in TASKS if (scores := released_scores(model, m, t))} for m in METHODS.values()}
    return {method: tasks for method, tasks in found.items() if tasks}


def families_of(
    methods: Sequence[str], bases: Mapping[str, str], controls: Sequence[str] = ()
) -> dict[str, list[tuple[str, str]]]:
    """Say which methods are compared with which: family -> pairs (first, second).

    Args:
        methods: Names of those that ran.
        bases: Variant -> the method that it varies.
        controls: Those that train nothing of the matrices that the methods are about.

    Raises:
        ValueError: If a name is neither a method nor a known variant.
    """
    unknown = [name for name in methods if name not in ORDER and name not in bases]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; methods are {', '.join(ORDER)}, variants {', '.join(bases)}")
    found = {"methods": [*itertools.combinations([name for name in ORDER if name in methods], 2)]}
    for control in controls:
        found[f"methods over {control}"] = [(name, control) for name in ORDER if name in methods]
    others = [name for name in methods if name not in ORDER and name not in controls]
    variants = sorted(others, key=lambda name: (ORDER.index(bases[name]), name))
    by_change: dict[str, list[str]] = {}
    for name in variants:
        by_change.setdefault(name.rpartition("_")[2], []).append(name)
    shared = {change: names for change, names in by_change.items() if len({bases[name] for name in names}) > 1}
    for change, names in shared.items():
        found[f"methods, {change}"] = [*itertools.combinations(names, 2)]
    for name in variants:
        if name not in itertools.chain(*shared.values()) and bases[name] in methods:
            found.setdefault(f"variants of {bases[name]}", []).append((name, bases[name]))
    for name, of in itertools.permutations(variants, 2):
        if name.startswith(f"{of}_"):
            found.setdefault(f"variants of {of}", []).append((name, of))
    return {family: pairs for family, pairs in found.items() if pairs}


def compare_methods(
    scores: Scores,
    bases: Mapping[str, str] | None = None,
    *,
    controls: Sequence[str] = (),
    seed: int = 0,
    samples: int = 10_000,
) -> Comparison:
    """Summarise every method of one model and compare them in pairs.

    Args:
        scores: Scores of one model's methods.
        bases: Variant -> the method that it varies.
        controls: See `families_of`.
        seed: Seed of bootstraps and sampled sign patterns.
        samples: Number of bootstrap resamples; ten times as many sign patterns.

    Raises:
        ValueError: If a method is unknown, or has no score.
    """
    families = families_of(list(scores), bases or {}, controls)
    summaries = {name: _summary(tasks, seed, samples) for name, tasks in scores.items()}
    compared = tuple(_family(name, pairs, scores, seed, samples) for name, pairs in families.items())
    return Comparison(summaries, compared)


def _summary(tasks: Mapping[str, Mapping[int, float]], seed: int, samples: int) -> Summary:
    runs = [list(found.values()) for found in tasks.values()]
    enough = sum(map(len, runs)) >= paired.LEAST_FOR_IQM
    return Summary(
        {task: mean_interval(list(found.values())) for task, found in tasks.items()},
        bootstrap(runs, seed=seed, samples=samples),
        bootstrap(runs, seed=seed, samples=samples, iqm=True) if enough else None,
    )


def _family(name: str, pairs: Sequence[tuple[str, str]], scores: Scores, seed: int, samples: int) -> Family:
    """Test all pairs, then correct: the means over tasks together, the single tasks together."""
    common = {pair: _common(scores[pair[0]], scores[pair[1]]) for pair in pairs}
    used = {pair: tasks for pair, tasks in common.items() if tasks}
    flips = {"seed": seed, "samples": 10 * samples}
    whole = {pair: paired.sign_flip_test(_differences(pair, scores, tasks), **flips) for pair, tasks in used.items()}
    single = {
        (pair, task): paired.sign_flip_test(_differences(pair, scores, {task: seeds}), **flips)
        for pair, tasks in used.items()
        for task, seeds in tasks.items()
    }
    whole_holm = dict(zip(whole, paired.holm([test.p for test in whole.values()]), strict=True))
    single_holm = dict(zip(single, paired.holm([test.p for test in single.values()]), strict=True))
    found = []
    for pair, tasks in used.items():
        differences = _differences(pair, scores, tasks)
        n = sum(map(len, differences))
        options = {"seed": seed, "samples": samples}
        runs = [[[*scores[method][task].values()] for task in tasks] for method in pair]
        total = sum(len(found) for method in pair for found in scores[method].values())
        found.append(
            Pair(
                *pair,
                {
                    task: _test([own], single[pair, task], single_holm[pair, task])
                    for task, own in zip(tasks, differences, strict=True)
                },
                _test(differences, whole[pair], whole_holm[pair]),
                bootstrap(differences, **options),
                bootstrap(differences, iqm=True, **options) if n >= paired.LEAST_FOR_IQM else None,
                paired.probability_of_improvement(*runs, **options),
                total - 2 * n,
            )
        )
    return Family(name, tuple(found), tuple(pair for pair in pairs if pair not in used))


def _common(
    first: Mapping[str, Mapping[int, float]], second: Mapping[str, Mapping[int, float]]
) -> dict[str, list[int]]:
    """Task -> seeds that both have, for the tasks with at least one."""
    shared = {task: sorted(set(first[task]) & set(second[task])) for task in first if task in second}
    return {task: seeds for task, seeds in shared.items() if seeds}


def _differences(pair: tuple[str, str], scores: Scores, tasks: Mapping[str, Sequence[int]]) -> list[list[float]]:
    first, second = (scores[method] for method in pair)
    return [[first[task][seed] - second[task][seed] for seed in seeds] for task, seeds in tasks.items()]


def _test(differences: Sequence[Sequence[float]], flips: paired.SignFlips, p_holm: float) -> Test:
    difference = mean_over_tasks(differences)
    verdict = verdicts.of_test(difference.value, p_holm)
    return Test(difference, sum(map(len, differences)), flips.p, p_holm, flips.least, verdict)
