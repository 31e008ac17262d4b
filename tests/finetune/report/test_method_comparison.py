"""Methods against each other: which pairs, which seeds, which corrections; scores of our runs, of the logs, losses."""

import numpy as np
import pytest
from scipy import stats

from finetune.published import TASKS
from finetune.report.labels import Labels
from finetune.report.statistics.families import Design, families_of
from finetune.report.statistics.method_comparison import compare_methods, scores_of_logs
from finetune.stats import intervals
from finetune.store.catalog import MethodFacts

FACTS = [
    MethodFacts("dora", "DoRA", "peft"),
    MethodFacts("frozen_mlp", "Frozen MLP", "full", control=True),
    MethodFacts("full", "Regular FT", "full"),
    MethodFacts("lora", "LoRA", "lora"),
    MethodFacts("sparsegrad", "SparseGrad", "sparsegrad"),
    MethodFacts("dora_wide", "DoRA, wide", "peft", extends="dora"),
    MethodFacts("sparsegrad_18k", "SparseGrad, 18k", "sparsegrad"),
    MethodFacts("truncated", "Truncated", "sparsegrad"),
    MethodFacts("truncated_refreshed", "Truncated, refreshed", "sparsegrad", extends="truncated"),
]
LABELS = Labels({facts.name: facts for facts in FACTS}, TASKS | {"news": "News"})
DESIGN = Design(LABELS, ("full", "lora", "sparsegrad"), samples=500)


def pair_of(comparison, first, second, family="methods"):
    (found,) = [one for one in comparison.families if one.name == family]
    return next(pair for pair in found.pairs if (pair.first, pair.second) == (first, second))


def scores(shift, tasks=("cola", "rte"), seeds=range(5), noise=0.1, seed=0):
    generator = np.random.default_rng(seed)
    return {task: {s: 60.0 + shift + noise * generator.normal() for s in seeds} for task in tasks}


def test_families_come_from_the_catalogue():
    found = families_of([facts.name for facts in FACTS], Design(LABELS, ("full", "lora", "dora", "sparsegrad")))
    assert {family.name: list(family.pairs) for family in found} == {
        "methods": [
            ("sparsegrad", "lora"),
            ("sparsegrad", "dora"),
            ("sparsegrad", "full"),
            ("lora", "dora"),
            ("lora", "full"),
            ("dora", "full"),
        ],
        "methods over frozen_mlp": [(n, "frozen_mlp") for n in ("sparsegrad", "lora", "dora", "full")],
        "variants of sparsegrad": [(n, "sparsegrad") for n in ("sparsegrad_18k", "truncated", "truncated_refreshed")],
        "variants of dora": [("dora_wide", "dora")],
        "variants of truncated": [("truncated_refreshed", "truncated")],
    }
    assert [(family.kind, family.of) for family in found[1:3]] == [
        ("methods over", "frozen_mlp"),
        ("variants of", "sparsegrad"),
    ]


def test_families_are_of_what_ran():
    assert families_of(["truncated", "lora"], DESIGN) == []  # what it varies did not run
    (family,) = families_of(["truncated", "truncated_refreshed"], DESIGN)
    assert family.pairs == (("truncated_refreshed", "truncated"),)
    with pytest.raises(ValueError, match=r"unknown methods \['other'\]"):
        families_of(["full", "other"], DESIGN)


def test_released_logs_of_bert():
    logs = scores_of_logs("bert_base")
    comparison = compare_methods(logs, Design(LABELS, tuple(logs), samples=2000))
    means = {method: round(found.mean.mean, 2) for method, found in comparison.methods.items()}
    assert means == {"full": 82.0, "lora": 82.33, "sparsegrad": 81.66}
    assert {found.mean.n for found in comparison.methods.values()} == {5}  # the search's seed is not among them
    pair = pair_of(comparison, "sparsegrad", "lora")
    assert pair.mean.difference.value == pytest.approx(81.66390 - 82.32850, abs=1e-4)
    assert pair.mean.pairs == 40 and pair.unpaired == 0 and set(pair.tasks) == set(TASKS)
    assert pair.mean.difference.low < pair.bootstrap.low < pair.bootstrap.mean == pair.mean.difference.value
    assert pair.mean.p == pytest.approx(0.069, abs=0.01) and pair.mean.verdict == "not separated"
    assert scores_of_logs("roberta_large")["full"].keys() == {"stsb", "cola", "mrpc", "qnli", "rte", "sst2"}
    assert scores_of_logs("llama2_7b") == {}


def test_differences_are_corrected_within_their_family():
    found = {"sparsegrad": scores(5), "lora": scores(0, seed=1), "full": scores(0, seed=2)}
    comparison = compare_methods(found | {"truncated": scores(0, seed=3)}, DESIGN)
    best, close = pair_of(comparison, "sparsegrad", "lora"), pair_of(comparison, "lora", "full")
    assert best.mean.least == best.mean.p == 2 / 2**10
    assert best.mean.p_holm == pytest.approx(3 * best.mean.p) and best.mean.verdict == "first is better"
    assert close.mean.verdict == "not separated"
    own = pair_of(comparison, "truncated", "sparsegrad", "variants of sparsegrad")
    assert own.mean.p_holm == own.mean.p and own.mean.verdict == "second is better"
    # Single tasks: five pairs allow 1/16 at least, six tests of the family on top of it.
    assert best.tasks["cola"].p == 2 / 2**5 and best.tasks["cola"].p_holm == pytest.approx(6 / 2**4)
    assert best.improvement.mean == 1.0 and best.iqm.mean == pytest.approx(5, abs=0.2)


def test_only_seeds_and_tasks_of_both_are_paired():
    found = {
        "sparsegrad": scores(1, ("news", "rte", "cola"), range(4)),
        "lora": scores(0, ("news", "rte"), range(2, 6)),
    }
    comparison = compare_methods(found, DESIGN)
    pair = pair_of(comparison, "sparsegrad", "lora")
    assert list(pair.tasks) == ["rte", "news"]  # a task that the paper lacks, after the paper's
    assert pair.mean.pairs == 4 and pair.unpaired == 12 + 8 - 2 * 4
    differences = [[found["sparsegrad"][task][s] - found["lora"][task][s] for s in (2, 3)] for task in ("rte", "news")]
    assert pair.mean.difference == intervals.mean_over_tasks(differences)
    assert pair.iqm is None and comparison.methods["lora"].iqm is not None  # four pairs, eight runs
    apart = compare_methods({"sparsegrad": scores(1, ("cola",)), "lora": scores(0, ("rte",))}, DESIGN)
    assert apart.families[0].pairs == () and apart.families[0].left_out == (("sparsegrad", "lora"),)


def test_one_seed_has_differences_and_no_interval():
    comparison = compare_methods({"sparsegrad": scores(1, seeds=[1]), "lora": scores(0, seeds=[1])}, DESIGN)
    pair = pair_of(comparison, "sparsegrad", "lora")
    assert pair.mean.difference.low is None and pair.bootstrap.low is None and pair.mean.least == 0.5
    assert pair.mean.verdict == "not separated"


def losses(**methods):
    return compare_methods({name: {"oasst1": found} for name, found in methods.items()}, DESIGN, losses=True)


def test_losses_are_compared_at_equal_seeds():
    found = losses(
        sparsegrad={s: 3.0 + 0.01 * s for s in (1, 2, 3)},
        lora={s: 3.2 + 0.02 * s for s in (1, 2, 3)},
        truncated={s: 3.1 + 0.011 * s for s in (2, 3, 4)},
    )
    assert found.methods["lora"].tasks["oasst1"].mean == pytest.approx(3.24)
    pair = pair_of(found, "sparsegrad", "lora")
    expected = stats.ttest_1samp([-0.21, -0.22, -0.23], 0)
    low, high = expected.confidence_interval()
    difference = pair.mean.difference
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.22, low, high))
    assert pair.mean.p == pair.mean.p_holm == pytest.approx(expected.pvalue) and pair.mean.least is None
    assert pair.mean.verdict == "first is better" and pair.improvement.mean == 1.0  # a lower loss
    pair = pair_of(found, "truncated", "sparsegrad", "variants of sparsegrad")
    assert pair.mean.pairs == 2 and pair.mean.difference.value == pytest.approx(0.1025)
    assert pair.mean.verdict == "second is better"


def test_losses_of_one_seed_have_no_test_and_noise_separates_nothing():
    test = pair_of(losses(full={1: 3.0}, lora={1: 4.0}), "lora", "full").mean
    assert (test.p, test.p_holm, test.verdict, test.difference.low) == (None, None, "not separated", None)
    noise = losses(full={0: 3.0, 1: 3.1, 2: 3.3}, lora={0: 3.1, 1: 3.3, 2: 3.0})
    test = pair_of(noise, "lora", "full").mean
    assert test.p > 0.05 and test.verdict == "not separated"
