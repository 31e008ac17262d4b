"""Predictions in records: who is better, worse or equal, which runs collapsed, and where early stopping would end."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from finetune.report.evidence.evidence import collect_evidence
from finetune.report.evidence.experiment import Experiment
from finetune.report.evidence.run import Evaluation, diverged
from finetune.report.labels import read_labels
from finetune.report.page.equivalence import equivalence_blocks
from finetune.report.statistics.equivalence import build_equivalence
from finetune.report.statistics.families import Design, Question
from finetune.report.statistics.run_courses import courses, early_stopped
from finetune.report.statistics.statistics_page import to_markdown
from finetune.report.statistics.statistics_record import build_statistics, plain
from finetune.stats import verdicts
from finetune.store.arrays import pack_array
from finetune.training.loop import _diverged

LABELS = read_labels("glue", Path(__file__).parents[3] / "conf")
METHODS = ("full", "lora", "meprop", "sparsegrad")
EXPERIMENT = Experiment(
    "test",
    "sound",
    {"bert_base": "minilm", "llama2_7b": "tiny"},
    methods=tuple(LABELS.methods),
    tasks=tuple(LABELS.tasks),
    labels=LABELS,
)
QUESTIONS = (
    Question("Is it worth training?", "all", ("frozen_mlp",)),
    Question("Is LoRA as good?", ("lora",), ("sparsegrad", "dora")),
    Question("Nobody ran it", ("dora",), ("sparsegrad_random",)),
)
DESIGN = Design(LABELS, METHODS, samples=2000, patience=2, questions=QUESTIONS)
ROWS = 400
METRICS = {
    "accuracy": lambda p, y: accuracy_score(y, p),
    "matthews_correlation": lambda p, y: matthews_corrcoef(y, p),
    "pearson": lambda p, y: stats.pearsonr(p, y).statistic if np.ptp(p) else 0.0,
    "loss": lambda p, y: p.sum() / y.sum(),
}
KINDS = {"accuracy": "int8", "matthews_correlation": "int8", "pearson": "float32", "loss": "float32"}


def record(method, task, seed, metric, best, labels, *, last=None, report=None, held=True, **changes):
    """A finished run that predicted `best` at step 2 and `last` at step 3; both selects and reports unless halved."""
    facts, last = LABELS.methods[method], best if last is None else last
    used = np.ones(labels.size, bool) if report is None else report
    evaluations = []
    for step, predicted in ((1, labels * 0), (2, best), (3, last)):
        one = {"step": step, metric: float(METRICS[metric](predicted[used], labels[used]))}
        if metric == "accuracy":
            one["f1"] = f1_score(labels[used], predicted[used], zero_division=0.0)
        if report is not None:
            one = {"step": step} | {f"report_{name}": value for name, value in one.items() if name != "step"}
            one[metric] = float(METRICS[metric](predicted[~used], labels[~used]))
        evaluations.append(one)
    names = {"kind": "train", "model": "minilm", "method": method, "task": task, "seed": seed} | changes
    chat = names["kind"] == "llama"
    packed = {"rows": labels.size, "report": None if report is None else pack_array(report, "bool")}
    packed |= {"labels": pack_array(labels, "int32" if chat else KINDS[metric])}
    packed |= {name: pack_array(one, KINDS[metric]) for name, one in (("best", best), ("last", last))}
    made = {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "score": evaluations[1][metric if report is None else f"report_{metric}"],
        "metric": metric,
        "evaluations": evaluations,
        "run": {"experiment": "test", "protocol": "sound", "scale": "local", "config_hash": "0"} | names,
        "parameters": {"trainable": 20, "trainable_per_layer": 1.0, "total": 1000},
        "model": {"title": {"minilm": "MiniLM-L6", "tiny": "Tiny"}[names["model"]], "random_weights": False},
        "config": {"method": {"name": method} | ({"base": facts.base} if facts.base != method else {})},
    }
    return f"{names['model']}/{method}-{task}-{seed}.json", made | ({"predictions": packed} if held else {})


def labels_of(metric, rows=ROWS):
    rng = np.random.default_rng(0)
    if metric == "pearson":
        return rng.uniform(0, 5, rows).astype(np.float32)
    return rng.integers(1, 20, rows) if metric == "loss" else (rng.random(rows) < 0.6).astype(np.int64)


def predicted(metric, labels, wrong, seed):
    """Wrong on the same rows for every method, and on 1 % of the rows by chance."""
    rng, shared = np.random.default_rng([1, seed]), np.random.default_rng(2).permutation(labels.size)
    if metric == "pearson":
        noise = np.random.default_rng(3).normal(0, 1, labels.size) + rng.normal(0, 0.02, labels.size)
        return (labels + wrong * 10 * noise).astype(np.float32)
    missed = (shared < wrong * labels.size) ^ (rng.random(labels.size) < 0.01)
    return np.where(missed, 1 - labels, labels)


def of_task(task, metric, wrong, seeds=(1, 2, 3, 4, 5), **options):
    labels = labels_of(metric)
    return [
        record(method, task, seed, metric, predicted(metric, labels, share, 10 * place + seed), labels, **options)
        for place, (method, share) in enumerate(wrong.items())
        for seed in seeds
    ]


WRONG = {"full": 0.3, "lora": 0.1, "sparsegrad": 0.1, "frozen_mlp": 0.2}


@pytest.fixture(scope="module")
def evidence():
    found = of_task("cola", "matthews_correlation", WRONG) + of_task("rte", "accuracy", WRONG)
    return collect_evidence(EXPERIMENT, records=found)


@pytest.fixture(scope="module")
def content(evidence):
    return build_statistics(evidence, replace(DESIGN, samples=1000, margin={"score": 3.0, "loss": 0.01}))


@pytest.fixture
def page(content):
    """The Markdown page with another part `equivalence`."""

    def make(evidence):
        found = {"equivalence": plain(build_equivalence(evidence, DESIGN))}
        return found, to_markdown(content | found)

    return make


def test_better_worse_and_equal(content):
    (entry,) = content["equivalence"]["models"]
    assert entry["rows"] == {"cola": ROWS, "rte": ROWS}
    methods = entry["families"][0]
    said = {(one["first"], one["second"]): one["mean"]["verdict"] for one in methods["pairs"]}
    assert said["sparsegrad", "full"] == said["lora", "full"] == verdicts.BETTER
    assert said["sparsegrad", "lora"] == verdicts.EQUAL
    controls = {one["first"]: one["mean"]["verdict"] for one in entry["families"][1]["pairs"]}
    assert controls == {"sparsegrad": verdicts.BETTER, "lora": verdicts.BETTER, "full": verdicts.WORSE}
    pair = next(one for one in methods["pairs"] if one["second"] == "full")
    assert pair["tasks"]["rte"]["verdict"] == verdicts.BETTER
    for one in (pair["mean"], *pair["tasks"].values()):
        test = one["test"]
        assert test["low"] < test["value"] < test["high"] and one["p_holm"] >= test["p"]
        assert 0 < test["detectable"] < test["value"] and test["seeds"] == 5


def test_values_are_the_differences_of_the_scores(content, evidence):
    pair = content["equivalence"]["models"][0]["families"][0]["pairs"][0]
    means = []
    for task in ("cola", "rte"):
        first, second = (
            np.mean([run.score for run in evidence.runs["minilm", pair[side], task]]) for side in ("first", "second")
        )
        assert pair["tasks"][task]["test"]["value"] == pytest.approx(first - second)
        means.append(first - second)
    assert pair["mean"]["test"]["value"] == pytest.approx(np.mean(means))


def test_questions_are_asked_of_what_ran(content):
    first, second = content["equivalence"]["models"][0]["questions"]
    assert [(one["first"], one["second"]) for one in first["pairs"]] == [
        (method, "frozen_mlp") for method in ("full", "lora", "sparsegrad")
    ]
    (pair,) = second["pairs"]
    assert (pair["first"], pair["second"], pair["mean"]["verdict"]) == ("lora", "sparsegrad", verdicts.EQUAL)


def test_page_and_statistics_hold_the_record(content):
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    text = to_markdown(content)
    assert not re.search(r"\bnan\b|None|inf\b|\n\n\n|[ \t]\n", text)
    lines = text.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("| question |"))
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[head : head + 6]]
    assert rows[0][-3:] == ["verdict", "CoLA", "RTE"] and {len(row) for row in rows} == {11}
    assert [row[0] for row in rows[2:]] == ["Is it worth training?", "", "", "Is LoRA as good?"]
    assert [row[8] for row in rows[2:]] == ["worse", "better", "better", "equal"]
    grids = {block.caption: block for block in equivalence_blocks(content, LABELS) if block.block == "grid"}
    assert {len(row) for row in grids["Questions, points"].rows} == {len(grids["Questions, points"].head)}
    assert len(grids["How the runs went, points"].rows) == 8


def test_without_predictions_nothing_is_new():
    found = of_task("rte", "accuracy", {"full": 0.3}, held=False)
    evidence = collect_evidence(EXPERIMENT, records=found)
    assert build_equivalence(evidence, DESIGN) is None
    content = build_statistics(evidence, replace(DESIGN, samples=10))
    assert "equivalence" not in content
    assert "multi-bootstrap" not in to_markdown(content)
    assert [*equivalence_blocks(content, LABELS)] == []


def test_one_seed_decides_nothing_and_is_said(page):
    found = of_task("rte", "accuracy", {"full": 0.3, "sparsegrad": 0.1}, seeds=(1,))
    content, text = page(collect_evidence(EXPERIMENT, records=found))
    (pair,) = content["equivalence"]["models"][0]["families"][0]["pairs"]
    assert pair["mean"]["verdict"] == verdicts.UNDECIDED and pair["mean"]["p_holm"] is None
    low, high = pair["mean"]["test"]["bootstrap"]
    assert 10 < low < 20 < high < 30
    assert "(rows alone) | 1 | - | - | - | undecided |" in text


def test_scores_are_of_the_rows_that_report():
    labels, report = labels_of("accuracy"), np.arange(ROWS) % 2 == 0
    best = np.where(report & (np.arange(ROWS) < 100), 1 - labels, labels)  # the other half is all right
    found = [record(m, "rte", s, "accuracy", best, labels, report=report) for m in ("full", "lora") for s in (1, 2)]
    evidence = collect_evidence(EXPERIMENT, records=found)
    run = evidence.runs["minilm", "full", "rte"][0]
    assert (run.score, run.evaluations[1].selecting, run.evaluations[1].reported) == (75.0, 100.0, 75.0)
    assert run.predictions.labels.size == ROWS // 2
    (entry,) = build_equivalence(evidence, DESIGN)["models"]
    assert entry["rows"] == {"rte": ROWS // 2} and entry["families"][0]["pairs"][0].mean.test.value == 0.0


def test_a_control_s_spread_is_the_margin(evidence):
    margin = {"score": "control", "loss": "control"}
    (entry,) = build_equivalence(evidence, replace(DESIGN, margin=margin))["models"]
    pair = entry["families"][0]["pairs"][0]
    spreads = [np.std([run.score for run in evidence.runs["minilm", "frozen_mlp", t]], ddof=1) for t in ("cola", "rte")]
    assert [pair.tasks[task].margin for task in ("cola", "rte")] == pytest.approx(spreads)
    assert pair.mean.margin == pytest.approx(math.hypot(*spreads) / 2)
    without = {key: runs for key, runs in evidence.runs.items() if key[1] != "frozen_mlp"}
    (entry,) = build_equivalence(replace(evidence, runs=without), replace(DESIGN, margin=margin))["models"]
    pair = entry["families"][0]["pairs"][0]
    assert pair.mean.margin is None and pair.mean.p_equal_holm is None


def test_losses_are_better_where_they_are_lower(page):
    labels = labels_of("loss")
    found = [
        record(
            method,
            "oasst1",
            seed,
            "loss",
            (labels * (mean + 0.001 * seed)).astype(np.float32),
            labels,
            kind="llama",
            model="tiny",
        )
        for method, mean in {"full": 3.0, "sparsegrad": 3.5, "lora": 3.5}.items()
        for seed in (1, 2, 3)
    ]
    content, text = page(collect_evidence(EXPERIMENT, records=found))
    (entry,) = content["equivalence"]["models"]
    assert {(one["first"], one["second"]): one["mean"]["verdict"] for one in entry["families"][0]["pairs"]} == {
        ("sparsegrad", "lora"): verdicts.EQUAL,
        ("sparsegrad", "full"): verdicts.WORSE,
        ("lora", "full"): verdicts.WORSE,
    }
    assert "+0.500 [+0.5" in text


def test_runs_on_other_rows_are_refused():
    labels = labels_of("accuracy")
    found = [record("full", "rte", 1, "accuracy", labels, labels), record("lora", "rte", 1, "accuracy", labels, labels)]
    found[1] = record("lora", "rte", 1, "accuracy", labels, 1 - labels)
    with pytest.raises(ValueError, match="lora-rte-1.json and minilm/full-rte-1.json predicted other rows of rte"):
        build_equivalence(collect_evidence(EXPERIMENT, records=found), DESIGN)


def test_arrays_of_other_lengths_are_refused():
    labels = labels_of("accuracy")
    path, made = record("full", "rte", 1, "accuracy", labels, labels)
    made["predictions"]["best"] = pack_array(labels[1:], "int8")
    with pytest.raises(ValueError, match=r"differ in length \(labels 400, best 399, last 400, report 400\)"):
        build_equivalence(collect_evidence(EXPERIMENT, records=[(path, made)]), DESIGN)


def failed(method, task, seed, error):
    path, made = record(method, task, seed, "accuracy", labels_of("accuracy"), labels_of("accuracy"), held=False)
    return path, made | {"status": "failed", "error": error, "score": None, "evaluations": []}


@pytest.mark.parametrize("held", [True, False])
def test_runs_that_collapsed_or_diverged_are_counted(held):
    labels = labels_of("accuracy")
    often, seldom = np.ones_like(labels), np.zeros_like(labels)
    good, other = (np.where(np.arange(ROWS) < share * ROWS, 1 - labels, labels) for share in (0.1, 0.3))
    runs = {1: often, 2: good, 3: seldom, 4: other, 5: labels}
    found = [record("full", "rte", seed, "accuracy", best, labels, held=held) for seed, best in runs.items()]
    # At step 1 all rows were put into class 0: the score at step 2 is what a record without predictions is judged by.
    found += [failed("full", "rte", 6, str(_diverged("loss is nan", 7, 1e-3))), failed("full", "rte", 7, "no memory")]
    zeros = np.zeros_like(labels)
    found += [record("lora", "cola", 1, "matthews_correlation", zeros, labels, held=held)]
    (cola, rte) = courses(collect_evidence(EXPERIMENT, records=found), "minilm", DESIGN)
    assert (cola.collapsed, cola.diverged, cola.share) == (1, 0, 1.0)
    assert (rte.runs, rte.collapsed, rte.diverged, rte.share) == (6, 2, 1, 0.5)
    assert {cola.by, rte.by} == {"predictions" if held else "scores"}


def test_without_f1_and_predictions_it_is_not_known():
    labels = labels_of("accuracy")
    path, made = record("full", "mnli", 1, "accuracy", labels, labels, held=False)
    for one in made["evaluations"]:
        del one["f1"]
    (course,) = courses(collect_evidence(EXPERIMENT, records=[(path, made)]), "minilm", DESIGN)
    assert (course.collapsed, course.share) == (None, None)


def test_errors_of_divergence_are_told_from_others():
    assert diverged({"error": str(_diverged("gradient is not finite", 3, 0.1))})
    assert not diverged({"error": "CUDA out of memory"})
    assert not diverged({"error": None})


@pytest.mark.parametrize(
    ("scores", "patience", "step"),
    [
        ([1, 3, 2, 2, 5], 2, 1),
        ([1, 3, 2, 2, 5], 3, 4),
        ([1, 3, 3, 3, 5], 2, 1),  # the same score is no better one
        ([1], 1, 0),
        ([3, 2, 1], 5, 0),
    ],
)
def test_early_stopping_keeps_the_best_before_it_ends(scores, patience, step):
    made = [Evaluation(place, score, -score) for place, score in enumerate(scores)]
    assert early_stopped(made, patience).step == step
    turned = [Evaluation(place, -score, score) for place, score in enumerate(scores)]
    assert early_stopped(turned, patience, lower_is_better=True).step == step


def test_scores_at_best_last_and_early_stopped():
    labels = labels_of("accuracy")
    last = np.where(np.arange(ROWS) < 40, 1 - labels, labels)
    found = [record("full", "rte", seed, "accuracy", labels, labels, last=last) for seed in (1, 2)]
    (course,) = courses(collect_evidence(EXPERIMENT, records=found), "minilm", replace(DESIGN, patience=1))
    assert (course.best.mean, course.last.mean, course.stopped.mean) == (100.0, 90.0, 100.0)
    assert plain(course)["best"] == {"mean": 100.0, "low": 100.0, "high": 100.0, "n": 2}
