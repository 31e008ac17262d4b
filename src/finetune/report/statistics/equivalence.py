"""Methods against each other by what they predicted: seeds and examples resampled together, and tests of equality.

Of the runs whose records hold predictions. `method_comparison` looks at scores alone and takes the validation rows as
given; here they are a sample too. p-values are corrected by Holm over the pairs of a family or a question, those of
single tasks over its pairs and tasks.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finetune.report.evidence.evidence import Evidence
from finetune.report.evidence.run import Run
from finetune.report.statistics.families import Design, families_of
from finetune.report.statistics.run_courses import courses
from finetune.stats import detectable, verdicts
from finetune.stats.multibootstrap import Draws, Equivalence, average, difference, equivalence
from finetune.stats.paired import holm
from finetune.stats.resampled import Resampled, resample_scores
from finetune.store.checks import LOWER_IS_BETTER


@dataclass(frozen=True)
class Verdict:
    """What a corrected test says of a pair.

    Attributes:
        test: Before the correction.
        p_holm, p_equal_holm: Corrected p-values; `None` where there is none.
        verdict: One of `verdicts.EQUIVALENCES`.
    """

    test: Equivalence
    margin: float | None
    p_holm: float | None
    p_equal_holm: float | None
    verdict: str


@dataclass(frozen=True)
class Tested:
    """A pair of methods, the first minus the second: over all shared tasks, and task by task."""

    first: str
    second: str
    mean: Verdict
    tasks: Mapping[str, Verdict]


@dataclass(frozen=True)
class Scored:
    """The runs of one task, resampled.

    Attributes:
        resampled: Scores in percent (losses: nats a token) of all runs of all methods.
        places: Method -> seed -> place among these runs.
    """

    resampled: Resampled
    places: Mapping[str, Mapping[int, int]]

    def of(self, method: str, seeds: Sequence[int]) -> Resampled:
        return self.resampled.of([self.places[method][seed] for seed in seeds])


def build_equivalence(evidence: Evidence, design: Design) -> dict[str, Any] | None:
    """The part of `statistics.json` that rests on predictions; `None` if no record holds any.

    Raises:
        ValueError: If runs of one task predicted other rows, or a record's predictions are damaged.
    """
    held = {model: None for (model, _, _), runs in evidence.runs.items() for run in runs if run.packed is not None}
    if not held:
        return None
    settings = {"margin": design.margin, "patience": design.patience, "power": detectable.POWER}
    return {"settings": settings, "models": [_of_model(evidence, model, design) for model in held]}


def _of_model(evidence: Evidence, model: str, design: Design) -> dict[str, Any]:
    runs = {(method, task): found for (name, method, task), found in evidence.runs.items() if name == model}
    tasks = design.labels.in_order({task for _, task in runs})
    by_task = {task: {m: found for (m, name), found in runs.items() if name == task} for task in tasks}
    scored = {task: found for task in tasks if (found := score_runs(task, by_task[task], design)) is not None}
    losses = model in evidence.decoders
    ran = list(dict.fromkeys(method for one in scored.values() for method in one.places))
    margins = _margins(scored, ran, design, "loss" if losses else "score")
    families, questions = [], []
    for family in families_of(ran, design):
        pairs = test_pairs(family.pairs, scored, margins, design.seed, losses=losses)
        families += [{"kind": family.kind, "of": family.of, "pairs": pairs}] if pairs else []
    for question in design.questions:
        pairs = test_pairs(question.pairs(ran), scored, margins, design.seed, losses=losses)
        questions += [{"ask": question.ask, "pairs": pairs}] if pairs else []
    without = sum(run.packed is None for found in runs.values() for run in found)
    return {
        "model": model,
        "title": next(iter(runs.values()))[0].title,
        "losses": losses,
        "rows": {task: _rows(by_task[task]) for task in scored},
        "without_predictions": without,
        "questions": questions,
        "families": families,
        "courses": [asdict(one) for one in courses(evidence, model, design)],
    }


def score_runs(task: str, runs: Mapping[str, Sequence[Run]], design: Design) -> Scored | None:
    """Resample the scores of all runs of a task; `None` if none holds predictions.

    Args:
        task: Decides with the design's seed which examples are drawn.
        runs: Method -> its runs.
        design: Gives seed and number of resamples.

    Raises:
        ValueError: If two runs have other labels.
    """
    every = [(method, run, run.predictions) for method, found in runs.items() for run in found]
    used = [(method, run, held) for method, run, held in every if held is not None]
    if not used:
        return None
    _, first, shared = used[0]
    for _, run, held in used:
        if not np.array_equal(held.labels, shared.labels) or run.metric != first.metric:
            raise ValueError(
                f"{run.path} and {first.path} predicted other rows of {task}, or have other metrics; runs of one task "
                "are compared on the same rows: run the older one again"
            )
    drawn = resample_scores(
        first.metric,
        np.stack([held.best for *_, held in used]),
        shared.labels,
        seed=_seeds(design.seed, task),
        samples=design.samples,
    )
    unit = 1 if first.metric in LOWER_IS_BETTER else 100
    places: dict[str, dict[int, int]] = {}
    for place, (method, run, _) in enumerate(used):
        places.setdefault(method, {})[run.seed] = place
    return Scored(Resampled(unit * drawn.scores, unit * drawn.replicates), places)


def test_pairs(
    pairs: Sequence[tuple[str, str]],
    scored: Mapping[str, Scored],
    margins: Mapping[str, float | None],
    seed: int,
    *,
    losses: bool = False,
) -> tuple[Tested, ...]:
    """Test pairs of methods on the tasks and seeds that both have, and correct them together.

    Args:
        pairs: (first, second).
        scored: Task -> its runs.
        margins: Task -> margin, `None` where there is none.
        seed: Of the draws of seeds.
        losses: Whether lower is better.

    Returns:
        The pairs that share a task and a seed.
    """
    single: dict[tuple[Any, str], Draws] = {}
    for pair in pairs:
        for task, one in scored.items():
            seeds = sorted(set.intersection(*({*one.places.get(method, ())} for method in pair)))
            if seeds:
                both = (one.of(method, seeds) for method in pair)
                single[pair, task] = difference(*both, paired=True, seed=_seeds(seed, task))
    shared = {pair: [task for task in scored if (pair, task) in single] for pair in pairs}
    shared = {pair: tasks for pair, tasks in shared.items() if tasks}
    means = {
        pair: (average([single[pair, task] for task in tasks]), _of_average([margins[task] for task in tasks]))
        for pair, tasks in shared.items()
    }
    whole = _corrected(means, losses)
    each = _corrected({key: (draws, margins[key[1]]) for key, draws in single.items()}, losses)
    return tuple(
        Tested(*pair, whole[pair], {task: each[pair, task] for task in tasks}) for pair, tasks in shared.items()
    )


def _corrected(draws: Mapping[Any, tuple[Draws, float | None]], losses: bool) -> dict[Any, Verdict]:
    tests = {key: equivalence(*one) for key, one in draws.items()}
    corrected: list[dict[Any, float]] = []
    for name in ("p", "p_equal"):
        known = {key: p for key, one in tests.items() if (p := getattr(one, name)) is not None}
        corrected.append(dict(zip(known, holm([*known.values()]), strict=True)))
    found = {}
    for key, one in tests.items():
        p, p_equal = (values.get(key) for values in corrected)
        verdict = verdicts.of_equivalence(one.value, p, p_equal, lower_is_better=losses)
        found[key] = Verdict(one, draws[key][1], p, p_equal, verdict)
    return found


def _margins(scored: Mapping[str, Scored], ran: Sequence[str], design: Design, unit: str) -> dict[str, float | None]:
    """Task -> margin: the number stated, or the control's standard deviation over seeds where it has several."""
    stated = design.margin[unit]
    if not isinstance(stated, str):
        return dict.fromkeys(scored, stated)
    control = next((name for name in ran if design.labels.methods[name].control), "")
    found: dict[str, float | None] = {}
    for task, one in scored.items():
        seeds = [*one.places.get(control, ())]
        spread = float(one.of(control, seeds).scores.std(ddof=1)) if len(seeds) > 1 else 0.0
        found[task] = spread or None
    return found


def _of_average(margins: Sequence[float | None]) -> float | None:
    """The margin of a mean over tasks: theirs if it is the same, else the spread of a mean of values spread so."""
    known = [margin for margin in margins if margin is not None]
    if len(known) < len(margins):
        return None
    return known[0] if len({*known}) == 1 else math.sqrt(sum(margin**2 for margin in known)) / len(known)


def _rows(runs: Mapping[str, Sequence[Run]]) -> int:
    return next(run.predictions.labels.size for found in runs.values() for run in found if run.predictions is not None)


def _seeds(seed: int, task: str) -> tuple[int, int]:
    """A generator's seed of its own for each task."""
    return seed, zlib.crc32(task.encode())
