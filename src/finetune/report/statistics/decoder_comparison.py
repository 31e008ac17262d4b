"""Methods and variants against each other on a decoder: validation losses at equal seeds.

At the three seeds of a decoder sign flips can separate nothing, so the test is the paired t test, which trusts that
differences of losses are normal; the page says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy import stats

from finetune.report.evidence.llama_evidence import LlamaEvidence
from finetune.report.statistics.families import Design, Family, families_of
from finetune.stats import paired, verdicts
from finetune.stats.intervals import Difference, Estimate, mean_interval, mean_over_tasks

Losses = Mapping[str, Mapping[int, float]]
"""Method -> seed -> loss in nats a token."""


@dataclass(frozen=True)
class LossPair:
    """Two methods, the first minus the second.

    Attributes:
        first: Method.
        second: Method.
        difference: Mean paired difference in nats a token, t interval.
        seeds: Those that both have.
        p: Two-sided p-value of the paired t test; `None` below two seeds.
        p_holm: The same, corrected for the family.
        verdict: `first is better`, `second is better` (lower loss) or `not separated`, by `p_holm`.
    """

    first: str
    second: str
    difference: Difference
    seeds: tuple[int, ...]
    p: float | None
    p_holm: float | None
    verdict: str


@dataclass(frozen=True)
class LossSummary:
    """The runs of one method: loss over seeds with a t interval, and the share of the model that trains, in percent."""

    loss: Estimate
    share: float


@dataclass(frozen=True)
class LossComparison:
    """What ran in LLaMa-2's place: `methods` by name, from the lowest loss, and `families` of pairs."""

    model: str
    title: str
    methods: Mapping[str, LossSummary]
    families: tuple[Family, ...]
    records: tuple[str, ...]


def compare_losses(evidence: LlamaEvidence, design: Design) -> LossComparison | None:
    """Compare the best validation losses of all runs; `None` where no decoder ran."""
    runs = {method: found for method, found in evidence.runs.items() if found}
    if not runs:
        return None
    summaries = {
        m: LossSummary(mean_interval([run.loss for run in found]), found[0].share) for m, found in runs.items()
    }
    first = next(iter(runs.values()))[0]
    losses = {method: {run.seed: run.loss for run in found} for method, found in runs.items()}
    return LossComparison(
        model=first.model,
        title=first.title,
        methods=dict(sorted(summaries.items(), key=lambda item: item[1].loss.mean)),
        families=tuple(_compared(family, losses) for family in families_of(runs, design)),
        records=tuple(sorted(run.path for found in runs.values() for run in found)),
    )


def _compared(family: Family, losses: Losses) -> Family:
    shared = {(x, y): sorted(losses[x].keys() & losses[y].keys()) for x, y in family.pairs}
    values = {(x, y): [losses[x][s] - losses[y][s] for s in seeds] for (x, y), seeds in shared.items() if seeds}
    tested = {pair: _p_value(found) for pair, found in values.items() if len(found) > 1}
    holm = dict(zip(tested, paired.holm([*tested.values()]), strict=True))
    pairs = []
    for pair, found in values.items():
        difference, p = mean_over_tasks([found]), holm.get(pair)
        verdict = verdicts.of_test(difference.value, p, lower_is_better=True)
        pairs.append(LossPair(*pair, difference, tuple(shared[pair]), tested.get(pair), p, verdict))
    return replace(family, pairs=tuple(pairs), left_out=tuple(pair for pair in shared if pair not in values))


def _p_value(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t test; equal differences leave no doubt, or nothing to doubt."""
    if len(set(differences)) == 1:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)
