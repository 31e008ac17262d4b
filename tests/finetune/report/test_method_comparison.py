"""Methods against each other: which pairs, which seeds, which corrections; our runs and the logs by the same code."""

import numpy as np
import pytest

from finetune.published import TASKS
from finetune.report.evidence.evidence import Evidence, Run
from finetune.report.statistics.method_comparison import compare_methods, families_of, scores_of_logs, scores_of_runs
from finetune.stats import intervals


def pair_of(comparison, first, second, family="methods"):
    (found,) = [one for one in comparison.families if one.name == family]
    return next(pair for pair in found.pairs if (pair.first, pair.second) == (first, second))


def test_released_logs_of_bert():
    comparison = compare_methods(scores_of_logs("bert_base"), samples=2000)
    means = {method: round(found.mean.mean, 2) for method, found in comparison.methods.items()}
    assert means == {"full": 82.0, "lora": 82.33, "sparsegrad": 81.66}
    assert {found.mean.n for found in comparison.methods.values()} == {5}  # the search's seed is not among them
    pair = pair_of(comparison, "sparsegrad", "lora")
    assert pair.mean.difference.value == pytest.approx(81.66390 - 82.32850, abs=1e-4)
    assert pair.mean.pairs == 40 and pair.unpaired == 0 and set(pair.tasks) == set(TASKS)
    assert pair.mean.difference.low < pair.bootstrap.low < pair.bootstrap.mean == pair.mean.difference.value
    assert pair.mean.p == pytest.approx(0.069, abs=0.01) and pair.mean.verdict == "not separated"


def test_runs_go_through_the_same_code():
    logs = scores_of_logs("bert_base")
    runs = {
        ("bert_base", method, task): tuple(
            Run(f"{seed}", "bert_base", "BERT", task, seed, score, "accuracy", "paper", 1, False, 1, 1.0)
            for seed, score in scores.items()
        )
        for method, tasks in logs.items()
        for task, scores in tasks.items()
    }
    evidence = Evidence("paper", "printed", {}, runs=runs | {("other", "full", "cola"): ()})
    assert compare_methods(scores_of_runs(evidence, "bert_base"), samples=500) == compare_methods(logs, samples=500)
    assert scores_of_logs("roberta_large")["full"].keys() == {"stsb", "cola", "mrpc", "qnli", "rte", "sst2"}
    assert scores_of_logs("llama2_7b") == {}


def scores(shift, tasks=("cola", "rte"), seeds=range(5), noise=0.1, seed=0):
    generator = np.random.default_rng(seed)
    return {task: {s: 60.0 + shift + noise * generator.normal() for s in seeds} for task in tasks}


def test_families():
    bases = {
        "truncated": "sparsegrad",
        "sparsegrad_18k": "sparsegrad",
        "lora_mlp": "lora",
        "sparsegrad_mlp": "sparsegrad",
    }
    found = families_of(["full", "lora", "sparsegrad", *bases], bases)
    assert found == {
        "methods": [("sparsegrad", "lora"), ("sparsegrad", "full"), ("lora", "full")],
        "methods, mlp": [("sparsegrad_mlp", "lora_mlp")],
        "variants of sparsegrad": [("sparsegrad_18k", "sparsegrad"), ("truncated", "sparsegrad")],
    }
    assert families_of(["sparsegrad_mlp", "sparsegrad"], bases) == {
        "variants of sparsegrad": [("sparsegrad_mlp", "sparsegrad")]
    }
    longer = families_of(["truncated", "truncated_refreshed", "truncate"], dict.fromkeys(
        ["truncated", "truncated_refreshed", "truncate"], "sparsegrad"))  # fmt: skip
    assert longer == {"variants of truncated": [("truncated_refreshed", "truncated")]}
    control = families_of(["full", "sparsegrad", "frozen_mlp"], {"frozen_mlp": "full"}, ["frozen_mlp"])
    assert control["methods over frozen_mlp"] == [("sparsegrad", "frozen_mlp"), ("full", "frozen_mlp")]
    assert set(control) == {"methods", "methods over frozen_mlp"}
    assert families_of(["truncated"], bases) == {}  # what it varies did not run
    with pytest.raises(ValueError, match=r"unknown methods \['other'\]"):
        families_of(["other"], bases)


def test_differences_are_corrected_within_their_family():
    found = {
        "sparsegrad": scores(5),
        "lora": scores(0, seed=1),
        "full": scores(0, seed=2),
        "truncated": scores(0, seed=3),
    }
    comparison = compare_methods(found, {"truncated": "sparsegrad"}, samples=500)
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
        "sparsegrad": scores(1, ("cola", "rte", "mrpc"), range(4)),
        "lora": scores(0, ("cola", "rte"), range(2, 6)),
    }
    comparison = compare_methods(found, samples=500)
    pair = pair_of(comparison, "sparsegrad", "lora")
    assert set(pair.tasks) == {"cola", "rte"} and pair.mean.pairs == 4
    assert pair.unpaired == 12 + 8 - 2 * 4
    differences = [[found["sparsegrad"][task][s] - found["lora"][task][s] for s in (2, 3)] for task in ("cola", "rte")]
    assert pair.mean.difference == intervals.mean_over_tasks(differences)
    assert pair.iqm is None and comparison.methods["lora"].iqm is not None  # four pairs, eight runs
    apart = compare_methods({"sparsegrad": scores(1, ("cola",)), "lora": scores(0, ("rte",))}, samples=500)
    assert apart.families[0].pairs == () and apart.families[0].left_out == (("sparsegrad", "lora"),)


def test_one_seed_has_differences_and_no_interval():
    comparison = compare_methods({"sparsegrad": scores(1, seeds=[1]), "lora": scores(0, seeds=[1])}, samples=500)
    pair = pair_of(comparison, "sparsegrad", "lora")
    assert pair.mean.difference.low is None and pair.bootstrap.low is None and pair.mean.least == 0.5
    assert pair.mean.verdict == "not separated"
