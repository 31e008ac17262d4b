"""Tables from records: labels, values, verdicts and reasons as data; what is refused; the files."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.published import TASKS, paper_table, released_scores
from finetune.report.evidence.evidence import collect_evidence, read_evidence
from finetune.report.evidence.experiment import Experiment, load_experiment
from finetune.report.labels import Labels
from finetune.report.model import Cell, Note, Reason, Table, read_table
from finetune.report.paper import layouts, printed
from finetune.report.tables import render
from finetune.report.tables.tables import build_table
from finetune.store import records
from finetune.store.catalog import MethodFacts, read_models
from finetune.store.checks import check_record

ROOT = Path(__file__).parents[3]
GLUE = (1, 4, 5, 9, 10, 11, 12, 13, 14, 15)
OWN = {name: name for name in layouts.PAPER_MODELS}
METHODS = ("full", "lora", "sparsegrad", "meprop")
KS = ("sparsegrad_18k", "sparsegrad_22k", "sparsegrad_30k", "sparsegrad_100k")
TRAINABLE = {"full": 109_483_778, "lora": 53_505_794, "sparsegrad": 53_494_274, "meprop": 53_494_274}
PER_LAYER = {"full": 2_359_296.0, "lora": 26_880.0, "sparsegrad": 28_000.0, "meprop": 28_000.0}
FACTS = {"dora": MethodFacts("dora", "DoRA", "peft"), "truncated": MethodFacts("truncated", "Truncated", "sparsegrad")}
EXPERIMENT = Experiment(
    "paper",
    "printed",
    OWN,
    methods=METHODS,
    ablations={"bert_base": KS},
    tasks=tuple(TASKS),
    labels=Labels(FACTS, TASKS | {"wnli": "WNLI"}),
)


def run(model, method, task, seed, score, *, side=None, kept=None, version=1, weights=False, **changes):
    """(path, record) of a finished run; `changes` are of the record or of its `run`."""
    names = {"model": model, "method": method, "task": task, "seed": seed, "config_hash": "0"}
    names |= {"experiment": "paper", "kind": "train", "protocol": "printed", "scale": "paper"}
    sides = {"hidden_size": side // 4, "intermediate_size": side} if side else {}
    record = {
        "schema": 1,
        "version": version,
        "status": "finished",
        "score": score,
        "metric": layouts.METRICS.get(task, "accuracy"),
        "run": names | {name: value for name, value in changes.items() if name in names},
        "parameters": {"trainable": TRAINABLE.get(method, 1), "trainable_per_layer": kept or PER_LAYER.get(method, 1)},
        "model": {"title": f"Title of {model}", "random_weights": weights},
        "config": {"model": {"architecture": sides}},
    }
    path = f"runs/{model}-{method}-{task}-{seed}.json"
    return path, record | {name: value for name, value in changes.items() if name in record}


def search(method, task, best, model="bert_base", scale="paper"):
    trials = [{"state": "complete"}, {"state": "complete"}, {"state": "pruned"}]
    names = {"model": model, "method": method, "task": task, "experiment": "paper", "kind": "search", "scale": scale}
    return f"search/{model}-{method}-{task}.json", {
        "run": names | {"protocol": "printed"},
        "best": best,
        "trials": trials,
    }


def built(number, records=(), searches=(), models=None, margin=1.0, **experiment):
    evidence = collect_evidence(replace(EXPERIMENT, **experiment), records=records, searches=searches, models=models)
    return build_table(number, evidence, margin=margin)


def released(methods=("full", "lora", "sparsegrad"), model="bert_base", **changes):
    """The authors' own BERT scores as if they were our runs."""
    return [
        run(model, method, task, seed, score / 100, **changes)
        for method in methods
        for task in TASKS
        for seed, score in released_scores("bert_base", method, task).items()
    ]


def kinds(cell):
    return {reason.kind for reason in cell.reasons}


@pytest.fixture(scope="module")
def logs():
    return built(9, released())


# Values and verdicts


@pytest.mark.parametrize("number", GLUE)
def test_nothing_run_gives_every_label_of_the_paper_and_not_run(number, tmp_path):
    table = built(number, stands_for={}, methods=(), ablations={})
    cells = {(cell.row, cell.column): (cell.paper, cell.paper_std) for cell in table.cells}
    print_ = {(one["row"], one["column"]): (one["value"], one["std"]) for one in paper_table(number)}
    parts = ("Full model", "MLP", "Embeddings", "Attention")
    extra = [(part, f"RoBERTa-large {kind}") for part in parts for kind in ("count", "share")] if number == 1 else []
    assert cells == print_ | dict.fromkeys(extra, ("", ""))
    assert {(cell.verdict, cell.value, cell.records) for cell in table.cells} == {("not run", None, ())}
    assert all(kinds(cell) == {"no_configuration" if number == 1 else "no_model"} for cell in table.cells)
    assert read_table(render.write_files(tmp_path, table)[0]) == table


def test_table_1_counts_and_rounding_marks():
    models = read_models(ROOT / "conf")
    table = built(1, models=models, stands_for={})
    assert table.cell("Full model", "LLaMa-2 count").value == 6_738_415_616
    large = table.cell("MLP", "RoBERTa-large share")
    assert large.value == pytest.approx(56.69, abs=0.005) and large.verdict == "not comparable"
    assert table.cell("MLP", "BERT count").records == ("conf/model/bert_base.yaml",)
    assert {(cell.row, cell.column): kinds(cell) for cell in table.cells if cell.verdict == "differs"} == {
        ("Attention", "BERT share"): {"cut_off"},
        ("Embeddings", "RoBERTa-base count"): {"other_digits"},
        ("Embeddings", "RoBERTa-base share"): {"other_digits"},
        ("Attention", "RoBERTa-base share"): {"cut_off"},
        ("Embeddings", "LLaMa-2 share"): {"cut_off"},
        ("Attention", "LLaMa-2 share"): {"cut_off"},
    }
    assert [cell.verdict for cell in table.cells].count("agrees") == 24 - 6
    assert len([note for note in table.notes if note.kind == "mark"]) == 6
    without = built(1, models={name: one for name, one in models.items() if name != "bert_base"})
    assert [without.cell("MLP", f"{name} share").verdict for name in ("BERT", "RoBERTa-base")] == ["not run", "agrees"]


def test_table_9_from_the_authors_own_logs(logs):
    averages = [logs.cell(row, "AVG").value for row in ("Regular FT", "LoRA", "SparseGrad")]
    assert averages == pytest.approx([82.0, 82.33, 81.66], abs=0.005)
    both = [cell for cell in logs.cells if cell.value is not None and cell.released is not None]
    assert len(both) == 27 and all(cell.value == pytest.approx(cell.released) and cell.n == 5 for cell in both)
    verdicts = {(cell.row, cell.column): cell.verdict for cell in logs.cells}
    assert verdicts["Regular FT", "STSB"] == "agrees"
    assert verdicts["LoRA", "MRPC"] == verdicts["SparseGrad", "MRPC"] == "differs"  # printed the other way round
    assert verdicts["SparseGrad", "CoLA"] == "inconclusive"
    assert {verdict for (row, _), verdict in verdicts.items() if row == "MeProp"} == {"not run"}
    cell = logs.cell("LoRA", "CoLA")
    assert cell.records == tuple(f"runs/bert_base-lora-cola-{seed}.json" for seed in (37, 42, 2023, 3705, 7777))
    assert (cell.method, cell.task, cell.quantity, cell.model) == ("lora", "cola", "score", "bert_base")
    assert len(logs.cell("LoRA", "AVG").records) == 40 and {*cell.sources} == {"paper", "ours", "released"}
    # MeProp's printed average lies outside what rounding of its cells allows.
    odd = [note.text for note in logs.notes if note.kind == "print"]
    assert [text.split(",")[0] for text in odd] == ["Regular FT", "MeProp"] and "does not follow" in odd[1]


def test_trainable_parameters(logs):
    model, layer = "#Trainable Model", "#Trainable MLP layer"
    assert (logs.cell("Regular FT", model).value, logs.cell("LoRA", layer).value) == (109_483_778, 26_880)
    assert logs.cell("Regular FT", model).verdict == logs.cell("LoRA", layer).verdict == "agrees"
    assert kinds(logs.cell("Regular FT", layer)) == {"other_digits"}  # 2,359,296 is no 3 mln
    assert logs.cell("LoRA", model).verdict == "differs"  # 53,505,794 is 54 mln; Table 5 prints that
    assert built(5, released()).cell("LoRA", "BERT #Trainable").verdict == "agrees"
    heads = [run("bert_base", "full", task, 1, 0.5) for task in ("cola", "mnli", "rte")]
    heads[1][1]["parameters"] = {"trainable": TRAINABLE["full"] + 769, "trainable_per_layer": 2_359_296.0}
    cell = built(9, heads).cell("Regular FT", model)
    assert cell.value == TRAINABLE["full"] and "109,483,778 to 109,484,547" in cell.sources["ours"]


def test_an_average_is_over_the_papers_tasks_and_says_which_ran():
    tasks = ("cola", "rte", "wnli")
    records = [run("bert_base", "full", task, seed, 0.8) for task in tasks for seed in (1, 2)]
    records += [run("bert_base", "full", "wnli", seed, 0.1) for seed in (3, 4)]
    cell = built(9, records, tasks=tasks).cell("Regular FT", "AVG")
    assert (cell.value, cell.n, cell.verdict) == (pytest.approx(80.0), 2, "not comparable")
    (reason,) = cell.reasons
    assert reason.kind == "partial_average" and "63.20" in reason.text  # the paper's mean of these two


def test_one_seed_has_no_interval_and_no_verdict():
    table = built(9, [run("bert_base", "full", task, 1, 0.8) for task in TASKS])
    for column in ("CoLA", "AVG"):
        cell = table.cell("Regular FT", column)
        assert (cell.low, cell.high, cell.n, cell.verdict) == (None, None, 1, "inconclusive")


def test_large_model_counts_three_runs_of_the_paper():
    records = [run("roberta_large", "full", "stsb", seed, score) for seed, score in enumerate((0.921, 0.922, 0.923))]
    # Welch's half width is about 1.2 points with three runs of the paper; with five it would be about 0.6.
    assert built(4, records).cell("Regular FT", "STSB").verdict == "inconclusive"
    assert built(4, records, margin=1.6).cell("Regular FT", "STSB").verdict == "agrees"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"scale": "local"}, "scale"),
        ({"weights": True}, "random_weights"),
        ({"metric": "f1"}, "metric"),
        ({"protocol": "sound"}, "protocol"),
        ({"model": "minilm"}, "other_model"),
    ],
)
def test_what_makes_a_score_not_comparable(changes, kind):
    own = changes.get("model", "bert_base")
    protocol = changes.get("protocol", "printed")
    table = built(9, released(["full"], **changes), protocol=protocol, stands_for={"bert_base": own})
    for column in ("RTE", "AVG"):
        cell = table.cell("Regular FT", column)
        assert (cell.verdict, kinds(cell), cell.model) == ("not comparable", {kind}, own)
    count = table.cell("Regular FT", "#Trainable Model").verdict
    assert count == ("not comparable" if kind in ("protocol", "other_model") else "agrees")
    assert ("stands in the place of BERT (bert_base)" in table.models[0]) == (own == "minilm")


# What ran, and what of it is used


def test_failed_runs_are_not_counted_and_named():
    records = [*released(["full"]), run("bert_base", "full", "rte", 99, math.nan, status="failed")]
    table = built(9, [*records, run("bert_base", "lora", "rte", 1, None, status="failed")])
    lora, full = table.cell("LoRA", "RTE"), table.cell("Regular FT", "RTE")
    assert full.n == 5 and full.flags == ("failed_runs",) and table.cell("Regular FT", "CoLA").flags == ()
    assert lora.verdict == "not run" and kinds(lora) == {"no_run", "failed"}
    (note,) = [note.text for note in table.notes if note.text.startswith("Failed runs: 2")]
    assert "runs/bert_base-full-rte-99.json" in note and "runs/bert_base-lora-rte-1.json" in note


def test_mixed_versions_are_flagged(logs):
    table = built(9, released(["full"]) + released(["lora"], version=2))
    assert {cell.row for cell in table.cells if "mixed_versions" in cell.flags} == {"Regular FT", "LoRA"}
    assert any("Mixed versions" in note.text for note in table.notes)
    assert not any("mixed_versions" in cell.flags for cell in logs.cells)


def test_other_experiments_protocols_kinds_and_unnamed_methods_and_tasks_stay_out():
    records = [
        run("bert_base", "full", "rte", 1, 0.6, experiment="other"),
        run("bert_base", "full", "rte", 1, 0.7, protocol="sound"),
        run("bert_base", "full", "rte", 1, 0.9, kind="ablation"),
        run("bert_base", "full", "wnli", 1, 0.9),
        run("bert_base", "dora", "rte", 1, 0.9),
        run("bert_base", "full", "rte", 1, 0.8),
    ]
    table = built(9, records)
    cell = table.cell("Regular FT", "RTE")
    assert (cell.value, cell.n) == (80.0, 1)
    (note,) = [note.text for note in table.notes if note.text.startswith("Records left out: 4")]
    assert all(text in note for text in ("experiment other", "protocol sound", "task wnli", "method dora"))


def test_a_fifth_method_a_ninth_task_and_ablations_have_rows_and_columns():
    names = {
        "methods": (*METHODS, "dora"),
        "ablations": {"bert_base": ("truncated",)},
        "tasks": ("cola", "rte", "wnli"),
    }
    ran = [run("bert_base", m, t, s, 0.5) for m in ("dora", "full") for t in ("cola", "wnli") for s in (1, 2)]
    ran += [run("bert_base", "truncated", task, 1, 0.5) for task in ("rte", "wnli")]
    table = built(9, ran, **names)
    assert table.rows == ("Regular FT", "LoRA", "SparseGrad", "MeProp", "DoRA", "Truncated")
    assert table.columns[-2:] == ("SST2", "WNLI")
    dora = table.cell("DoRA", "CoLA")
    assert (dora.value, dora.n, dora.paper, dora.verdict, kinds(dora)) == (50, 2, "", "not comparable", {"not_printed"})
    assert table.cell("Regular FT", "WNLI").value == 50 and table.cell("LoRA", "WNLI").verdict == "not run"
    assert table.cell("DoRA", "MNLI") is None  # neither printed nor run
    # An ablation's mean over fewer tasks would mislead beside the others'.
    average, ablation = table.cell("Truncated", "AVG"), table.cell("Truncated", "WNLI")
    assert average.value is None and kinds(average) == {"partial_average"} and ablation.value == 50
    assert ablation.flags == ("ablation",) and dora.flags == ()
    five = built(5, ran, **names)
    assert five.cell("DoRA", "RoBERTa-base AVG").verdict == "not run"
    assert five.cell("Truncated", "BERT #Trainable").value == 1
    assert five.cell("Truncated", "RoBERTa-base AVG") is None  # not run on that model
    assert built(13, ran, **names).cell("WNLI", "learning rate").verdict == "not run"
    assert built(11, ran, **names).columns[-1] == "WNLI"


def test_an_experiment_is_read_with_its_labels():
    found = load_experiment(ROOT / "experiments" / "local.yaml", "local", ROOT / "conf")
    assert found.methods == ("full", "lora", "meprop", "sparsegrad") and found.stands_for["bert_base"] == "minilm"
    assert "frozen_mlp" in found.ablations["minilm"] and "sparsegrad_100k" in found.ablations["stories260k"]
    assert found.labels.method("frozen_mlp") == "Frozen MLP" and 9 in found.tables
    with pytest.raises(ValueError, match="is experiment 'local', not 'smoke'"):
        load_experiment(ROOT / "experiments" / "local.yaml", "smoke", ROOT / "conf")


# Settings


def test_search_tables():
    best = {"learning_rate": 1e-4, "batch_size": 16}
    searches = [search("sparsegrad", task, best) for task in ("rte", "cola")] + [search("sparsegrad", "sst2", None)]
    table = built(13, searches=searches)
    rate = table.cell("RTE", "learning rate")
    assert (rate.value, rate.paper, rate.released, rate.n) == (1e-4, "6.81e-5", 6.81e-5, 2)
    assert rate.verdict == table.cell("RTE", "batch size").verdict == "agrees"
    assert rate.records == ("search/bert_base-sparsegrad-rte.json",)
    assert table.cell("CoLA", "learning rate").verdict == table.cell("CoLA", "batch size").verdict == "differs"
    assert kinds(table.cell("SST2", "learning rate")) == {"no_value"}
    assert kinds(table.cell("STSB", "learning rate")) == {"no_search"}
    assert {cell.verdict for cell in built(14, searches=searches).cells} == {"not run"}
    for value, verdict in ((1.36e-4, "agrees"), (1.37e-4, "differs"), (3.41e-5, "agrees"), (3.4e-5, "differs")):
        found = built(13, searches=[search("sparsegrad", "rte", best | {"learning_rate": value})])
        assert found.cell("RTE", "learning rate").verdict == verdict  # within a factor of two
    for model, scale, kind in (("minilm", "paper", "other_model"), ("bert_base", "local", "scale")):
        found = built(13, searches=[search("sparsegrad", "rte", best, model, scale)], stands_for={"bert_base": model})
        assert kinds(found.cell("RTE", "batch size")) == {kind}


# k


def kept_runs(name, kept, side=3072, task="cola", seeds=(1, 2, 3)):
    return [run("bert_base", name, task, s, 0.59 + s / 1000, kept=kept, side=side) for s in seeds]


def test_table_11_holds_k_against_the_label():
    kept = {"sparsegrad": 28_000, "sparsegrad_18k": 18_000, "sparsegrad_30k": 30_000, "sparsegrad_100k": 100_000}
    table = built(11, [one for name, k in kept.items() for one in kept_runs(name, k)])
    score = table.cell("0.8", "CoLA")
    assert (score.value, score.released, score.verdict) == (pytest.approx(59.2), None, "agrees")  # 59.1 ± 0.5 printed
    assert {table.cell("1", column).verdict for column in ("k per layer", "AVG", "CoLA")} == {"not run"}
    shares = {row: table.cell(row, "k per layer") for row in ("100", "0.8", "1.2", "4.2")}
    assert [cell.value for cell in shares.values()] == [28_000, 18_000, 30_000, 100_000]
    assert [kinds(cell) for cell in shares.values()] == [{"other_digits"}, set(), {"cut_off"}, set()]
    assert [cell.verdict for cell in shares.values()] == ["differs", "agrees", "differs", "agrees"]
    assert table.cell("100", "CoLA").released == pytest.approx(58.77, abs=0.005)


def test_the_share_of_another_width_is_what_is_compared():
    records = kept_runs("sparsegrad_18k", 4_500, 1536, seeds=(1, 2))
    cell = built(11, records).cell("0.8", "k per layer")
    assert (cell.value, cell.verdict) == (4_500, "agrees")
    cell = built(11, records + kept_runs("sparsegrad_18k", 45_000, 1536, seeds=(3,))).cell("0.8", "k per layer")
    assert cell.verdict == "not comparable" and kinds(cell) == {"records_disagree"}
    cell = built(11, kept_runs("sparsegrad", 5, None)).cell("100", "k per layer")
    assert cell.verdict == "not comparable" and kinds(cell) == {"no_architecture"}


def test_inferred_and_unknown_cells_are_compared_with_nothing():
    names = {"sparsegrad": 28_000, "sparsegrad_18k": 18_000}
    table = built(11, [one for name, k in names.items() for task in TASKS for one in kept_runs(name, k, task=task)])
    inferred, unknown = table.cell("100", "SST2"), table.cell("0.8", "SST2")
    assert inferred.paper == "92.4" and inferred.flags == ("inferred",) and kinds(inferred) == {"inferred"}
    assert inferred.verdict == unknown.verdict == "not comparable" and kinds(unknown) == {"not_printed"}
    # The average's verdict needs a deviation of every task; the one of SST2 is not printed.
    assert table.cell("100", "AVG").verdict == table.cell("0.8", "AVG").verdict == "inconclusive"


def test_faults_of_tables_11_and_12_are_found():
    notes = {number: [one.text for one in built(number).notes if one.kind == "print"] for number in (11, 12)}
    for number, *parts in (
        (11, "Row 100: every printed score and deviation is that of table 9, SparseGrad"),
        (12, "Row 100: every printed score and deviation is that of table 10, SparseGrad"),
        (12, "Row 1.4 (printed; 100k is 4.2): 100,000 is 4.239 %", "another share"),
        (12, "100, AVG as printed (83.6): does not follow", "91.55 to 93.05", "with 94.2"),
        (12, "0.8, AVG as printed (83.4): follows only with an odd cell", "98.25 to 99.75"),
        (11, "100, AVG as printed (82.6): follows:"),
        (11, "Inferred, not printed", "row 100 SST2 92.4"),
        (12, "Not known: row 0.8 SST2."),
    ):
        assert any(all(part in note for part in parts) for note in notes[number]), parts


# What is refused


def broken(**changes):
    path, record = run("bert_base", "full", "rte", 1, 0.5)
    return [(path, {name: value for name, value in (record | changes).items() if value != "absent"})]


BEST = {"learning_rate": 1e-4, "batch_size": 16}


@pytest.mark.parametrize(
    ("what", "content", "message"),
    [
        ("records", broken(score=math.nan), r"score is nan; .*finite score in \[-1, 1\]"),
        ("records", broken(score=71.0), r"not percent"),
        ("records", broken(score="absent"), r"runs/bert_base-full-rte-1.json: there is no 'score'"),
        ("records", broken(run={"kind": "train"}), r"there is no 'run.model'"),
        ("records", broken(status="running"), r"status='running'; .*'finished' or 'failed'"),
        ("records", broken(schema=2), r"schema=2"),
        ("records", broken(parameters={"trainable": -1, "trainable_per_layer": 1.0}), r"counts >= 0"),
        ("records", [("x.json", [])], r"x.json: there is no 'run.kind'"),
        ("records", broken() * 2, r"two record files of \('bert_base', 'full', 'rte', 1\)"),
        ("searches", [search("full", "rte", BEST)] * 2, "two search files"),
        ("searches", [search("full", "rte", BEST | {"learning_rate": 0})], "above 0"),
    ],
)
def test_bad_evidence(what, content, message):
    with pytest.raises(ValueError, match=message):
        collect_evidence(EXPERIMENT, **{what: content})


@pytest.mark.parametrize("number", [0, 2, 16])
def test_unknown_table(number):
    with pytest.raises(ValueError, match="unknown table number"):
        built(number)


@pytest.mark.parametrize(
    ("text", "value", "rounding", "exact", "rounded", "truncated"),
    [
        ("82.5", 82.5, 0.05, 82.45, "82.5", "82.4"),
        ("109 M", 109e6, 0.5e6, 109_482_240, "109 M", "109 M"),
        ("6.7 B", 6.7e9, 0.05e9, 6_738_415_616, "6.7 B", "6.7 B"),
        ("0.05 mln", 5e4, 5e3, 51_200, "0.05 mln", "0.05 mln"),
        ("25%", 25, 0.5, 25.89, "26%", "25%"),
        ("1.24e-4", 1.24e-4, 5e-7, 1.249e-4, "0.000125", "0.000124"),
    ],
)
def test_printed_numbers(text, value, rounding, exact, rounded, truncated):
    number = printed.parse(text)
    assert (number.value, number.rounding) == (pytest.approx(value), pytest.approx(rounding))
    assert (number.round(exact).text, number.truncate(exact).text) == (rounded, truncated)


def test_unreadable_print():
    for text in ("", "about 5"):
        with pytest.raises(ValueError, match=f"cannot read '{text}'"):
            printed.parse(text)


# Files

SMALL = Table(
    9,
    "table_09",
    "BERT on GLUE",
    "local",
    "printed",
    (
        Cell("Regular FT", "#Trainable", "trainable", value=109483778, paper="109 mln", verdict="agrees"),
        Cell(
            "Regular FT", "CoLA", "score", "full", "cola", 58.964, 55.85, 62.08, 5, "59.0", "1.9", 58.9638,
            "inconclusive", (Reason("scale", 'a "b", c'),), ("inferred",), {"ours": "x"}, records=("a.json", "b.json"),
        ),
        Cell("A_B & 50% | c", "CoLA", "score", verdict="not run"),
    ),
    ("BERT is the paper's own model.",),
    (Note("loss", "Failed runs: none."), Note("warning", "load")),
)  # fmt: skip


def test_csv_of_a_small_table():
    assert render.to_csv(SMALL) == (
        "row,column,ours,ours_low,ours_high,n,paper,paper_std,released,source,verdict,protocol,model,records\n"
        "Regular FT,#Trainable,109483778,,,,109 mln,,,,agrees,,,\n"
        'Regular FT,CoLA,58.964,55.85,62.08,5,59.0,1.9,58.9638,"ours: x; inconclusive: a ""b"", c; flags: inferred",'
        "inconclusive,,,a.json;b.json\n"
        "A_B & 50% | c,CoLA,,,,,,,,,not run,,,\n"
    )


def test_markdown_of_a_small_table():
    assert (
        render.to_text("md", SMALL)
        == r"""# Table 9 of the paper: BERT on GLUE (experiment local, protocol printed)

BERT is the paper's own model.

Each cell: ours [95 % interval] and the verdict's mark | the paper's ± its deviation | the authors' released logs'.

|  | #Trainable | CoLA |
| --- | --- | --- |
| Regular FT | 109,483,778 = \| 109 mln | 58.96 [55.85, 62.08] ? \| 59.0 ± 1.9 (inferred) \| released 58.96 |
| A_B & 50% \| c | – | not run \| not printed |

Notes

- Verdicts: = agrees (1), ≠ differs (0), ? inconclusive (1), n/c not comparable (0), – not run (1).
- n (runs, or completed trials of a search): 5.
- Not run: A_B & 50% | c (CoLA).
- Failed runs: none.
- Warning: load
- Every cell's sources, reasons and records are in the files of the same name, CSV and JSON.
"""
    )


def test_latex_of_a_small_table_and_of_a_wide_one(logs):
    lines = render.to_text("tex", SMALL).splitlines()
    assert r"Regular FT & ours & 109,483,778 & 58.96 \\" in lines
    assert r" & 95 \% interval &  & {[55.85, 62.08]} \\" in lines
    assert r"A\_B \& 50\% \textbar{} c & verdict &  & -- \\" in lines
    text = render.to_text("tex", logs)
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert body and {line.replace(r"\&", "").count("&") for line in body} == {len(logs.columns) + 1}
    plain = text.replace(r"\{", "").replace(r"\}", "")
    assert plain.count("{") == plain.count("}") and plain.count(r"\begin") == plain.count(r"\end") == 2
    assert text.isascii()


def test_written_files_read_back(tmp_path, logs, monkeypatch):
    paths = render.write_files(tmp_path, logs)
    assert [path.name for path in paths] == [f"table_09.{suffix}" for suffix in ("json", "csv", "md", "tex")]
    assert read_table(paths[0]) == logs
    with paths[1].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["column"], row["verdict"]) for row in rows] == [
        (cell.row, cell.column, cell.verdict) for cell in logs.cells
    ]
    assert [float(row["ours"]) if row["ours"] else None for row in rows] == pytest.approx(
        [cell.value for cell in logs.cells]
    )
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in render.write_files(tmp_path, logs)] == before
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        render.write_files(tmp_path, SMALL)
    assert [path.read_bytes() for path in paths] == before and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((), "has no cells"),
        ((replace(SMALL.cells[0], verdict="fine"),), "verdict 'fine'; allowed are agrees"),
        (SMALL.cells[:1] * 2, "two cells of"),
        ((replace(SMALL.cells[0], value=math.inf),), "JSON"),
    ],
)
def test_bad_tables_write_nothing(tmp_path, cells, message):
    with pytest.raises(ValueError, match=message):
        render.write_files(tmp_path, replace(SMALL, cells=cells))
    assert not list(tmp_path.iterdir())


def test_damaged_tables_are_refused(tmp_path):
    path = tmp_path / "table_09.json"
    render.write_files(tmp_path, SMALL)
    content = json.loads(path.read_text())
    for change, message in (({"schema": 7}, "no table of schema"), ({"notes": [{}]}, "damaged"), ({"x": 1}, "damaged")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            read_table(path)


def test_importing_the_tables_does_not_import_torch():
    code = "import sys, finetune.report.tables.tables; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_an_edited_score_becomes_no_value_of_a_table(tmp_path, monkeypatch):
    """A cell of real records; one of them says more than its runs reached, or less of it is listed."""
    monkeypatch.setattr(records, "check_record", check_record)
    local = ROOT / "results" / "local"
    folder = tmp_path / "runs" / "minilm" / "full"
    shutil.copytree(local / "runs" / "minilm" / "full", folder)
    experiment = replace(EXPERIMENT, name="local", protocol="sound", tasks=("cola", "mrpc", "stsb"))
    whole = read_evidence(experiment, tmp_path, ROOT / "conf").runs["minilm", "full", "cola"]
    assert len(whole) == 3
    path = next(folder.glob("cola-seed2-*.json"))
    text = path.read_text()
    path.write_text(text.replace(f'"score": {json.loads(text)["score"]!r}', '"score": 0.99'))
    with pytest.raises(ValueError, match=f"{path.name} is not what was written: its checksum is another"):
        read_evidence(experiment, tmp_path, ROOT / "conf")
    records.write_record(path, json.loads(text) | {"score": 0.99})
    with pytest.raises(ValueError, match=f"{path.name} has score 0.99, the best of its evaluations is"):
        read_evidence(experiment, tmp_path, ROOT / "conf")
    path.write_text(text)
    listed = records.listed_records(folder / "cell.json")
    records.write_json(folder / "cell.json", {"records": [name for name in listed if name != path.name]})
    with pytest.raises(ValueError, match=f"cell.json lacks {path.name}, which lies beside it"):
        read_evidence(experiment, tmp_path, ROOT / "conf")
