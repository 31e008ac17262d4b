"""Tables from records: labels, values, verdicts, flags, files."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.published import TASKS, paper_table, released_scores
from finetune.report.paper import layouts, printed
from finetune.report.tables import writers
from finetune.report.tables.tables import COLUMNS, TABLES, Context, build_table, collect_evidence, write_table

ROOT = Path(__file__).parents[3]
OWN = {name: name for name in layouts.PAPER_MODELS}
TRAINABLE = {"full": 109_483_778, "lora": 53_505_794, "sparsegrad": 53_494_274, "meprop": 53_494_274}
PER_LAYER = {"full": 2_359_296.0, "lora": 26_880.0, "sparsegrad": 28_000.0, "meprop": 28_000.0}


def _run(model, method, task, seed, **changes):
    keys = {"experiment": "paper", "kind": "train", "protocol": "printed", "scale": "paper", "config_hash": "0"}
    run = {"model": model, "method": method, "task": task, "seed": seed, **keys}
    return run | {name: changes[name] for name in run if name in changes}


def _record(model, method, task, seed, score, **changes):
    run = _run(model, method, task, seed, **changes)
    record = {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "score": score,
        "metric": layouts.METRICS.get(task, "accuracy"),
        "run": run,
        "parameters": {"trainable": TRAINABLE.get(method, 1), "trainable_per_layer": PER_LAYER.get(method, 1)},
        "model": {"title": f"Title of {model}", "random_weights": changes.get("random_weights", False)},
    }
    record |= {name: value for name, value in changes.items() if name in record and name != "model"}
    return f"runs/{model}-{method}-{task}-{seed}.json", record


def _search(model, method, task, best, **changes):
    trials = [{"number": 0, "state": "complete"}, {"number": 1, "state": "complete"}, {"number": 2, "state": "pruned"}]
    run = _run(model, method, task, None, **changes)
    return f"search/{model}-{method}-{task}.json", {"run": run, "best": best, "trials": trials, "n_trials": 3}


def _evidence(records=(), *, stands_for=OWN, protocol="printed", searches=(), models=()):
    keys = {"experiment": "paper", "protocol": protocol, "stands_for": stands_for}
    return collect_evidence(**keys, records=records, searches=searches, models=models)


def _released(methods=("full", "lora", "sparsegrad"), **changes):
    """The authors' own BERT scores as if they were our runs."""
    return [
        _record("bert_base", method, task, seed, score / 100, **changes)
        for method in methods
        for task in TASKS
        for seed, score in released_scores("bert_base", method, task).items()
    ]


def _models():
    paths = sorted((ROOT / "conf" / "model").glob("*.yaml"))
    return [(f"conf/model/{path.name}", yaml.safe_load(path.read_text(encoding="utf-8"))) for path in paths]


def _cells(number, evidence, **options):
    return {(row["row"], row["column"]): row for row in build_table(number, evidence, **options)[0]}


@pytest.mark.parametrize("number", TABLES)
def test_nothing_run_gives_every_label_of_the_paper_and_not_run(number, tmp_path):
    rows, context = build_table(number, _evidence(stands_for={}))
    reference = paper_table(number)
    assert [(row["row"], row["column"], row["paper"], row["paper_std"]) for row in rows[: len(reference)]] == [
        (cell["row"], cell["column"], cell["value"], cell["std"]) for cell in reference
    ]
    extra = [(row["row"], row["column"]) for row in rows[len(reference) :]]
    parts = ("Full model", "MLP", "Embeddings", "Attention")
    wanted = [(part, f"RoBERTa-large {kind}") for part in parts for kind in ("count", "share")]
    assert extra == (wanted if number == 1 else [])
    assert {row["verdict"] for row in rows} == {"not run"}
    assert all(tuple(row) == COLUMNS and row["ours"] is None and row["records"] == "" for row in rows)
    for path in write_table(tmp_path, number, rows, context):
        assert path.read_text(encoding="utf-8")


def test_table_1_counts_and_rounding_marks():
    cells = _cells(1, _evidence(stands_for={}, models=_models()))
    assert cells["Full model", "LLaMa-2 count"]["ours"] == 6_738_415_616
    assert cells["MLP", "RoBERTa-large count"]["ours"] == 201_449_472
    assert cells["MLP", "RoBERTa-large share"]["ours"] == pytest.approx(56.69, abs=0.005)
    assert cells["MLP", "RoBERTa-large count"]["verdict"] == "not comparable"
    assert cells["MLP", "BERT count"]["records"] == "conf/model/bert_base.yaml"
    differs = {key: row["source"] for key, row in cells.items() if row["verdict"] == "differs"}
    assert set(differs) == {
        ("Attention", "BERT share"),
        ("Embeddings", "RoBERTa-base count"),
        ("Embeddings", "RoBERTa-base share"),
        ("Attention", "RoBERTa-base share"),
        ("Embeddings", "LLaMa-2 share"),
        ("Attention", "LLaMa-2 share"),
    }
    cut = {key for key, source in differs.items() if "cut off, not rounded" in source}
    assert set(differs) - cut == {("Embeddings", "RoBERTa-base count"), ("Embeddings", "RoBERTa-base share")}
    assert "38,999,040 rounds to 39 M, the paper prints 40 M" in differs["Embeddings", "RoBERTa-base count"]
    assert sum(row["verdict"] == "agrees" for row in cells.values()) == 24 - 6


def test_table_1_without_a_configuration():
    models = [(path, config) for path, config in _models() if config["name"] != "bert_base"]
    cells = _cells(1, _evidence(models=models))
    assert cells["MLP", "BERT share"]["verdict"] == "not run"
    assert cells["MLP", "RoBERTa-base share"]["verdict"] == "agrees"


def test_table_9_from_the_authors_own_logs():
    cells = _cells(9, _evidence(_released()))
    assert [round(cells[row, "AVG"]["ours"], 2) for row in ("Regular FT", "LoRA", "SparseGrad")] == [82.0, 82.33, 81.66]
    for row in cells.values():
        if row["ours"] is not None and row["released"] is not None:
            assert row["ours"] == pytest.approx(row["released"]) and row["n"] == 5
    verdicts = {key: row["verdict"] for key, row in cells.items()}
    assert verdicts["Regular FT", "STSB"] == "agrees"
    assert verdicts["LoRA", "MRPC"] == verdicts["SparseGrad", "MRPC"] == "differs"  # printed the other way round
    assert verdicts["SparseGrad", "CoLA"] == "inconclusive"
    assert {verdict for (row, _), verdict in verdicts.items() if row == "MeProp"} == {"not run"}
    records = cells["LoRA", "CoLA"]["records"].split(";")
    assert records == [f"runs/bert_base-lora-cola-{seed}.json" for seed in (37, 42, 2023, 3705, 7777)]
    assert len(cells["LoRA", "AVG"]["records"].split(";")) == 40
    assert cells["LoRA", "CoLA"]["source"].startswith("paper: arxiv_pdf table9; ours: mean of 5 seeds (37, 42, 2023, ")


def test_trainable_parameters():
    cells = _cells(9, _evidence(_released()))
    assert cells["Regular FT", "#Trainable Model"]["ours"] == 109_483_778
    assert cells["Regular FT", "#Trainable Model"]["verdict"] == "agrees"
    assert cells["LoRA", "#Trainable MLP layer"]["ours"] == 26_880
    assert cells["LoRA", "#Trainable MLP layer"]["verdict"] == "agrees"
    assert cells["Regular FT", "#Trainable MLP layer"]["verdict"] == "differs"
    assert "2,359,296 rounds to 2 mln, the paper prints 3 mln" in cells["Regular FT", "#Trainable MLP layer"]["source"]
    assert cells["LoRA", "#Trainable Model"]["verdict"] == "differs"  # 53,505,794 is 54 mln; Table 5 prints that
    assert _cells(5, _evidence(_released()))["LoRA", "BERT #Trainable"]["verdict"] == "agrees"


def test_counts_that_differ_between_heads_say_so():
    records = [_record("bert_base", "full", task, 1, 0.5) for task in ("cola", "mnli", "rte")]
    records[1][1]["parameters"] = {"trainable": TRAINABLE["full"] + 769, "trainable_per_layer": 2_359_296.0}
    cell = _cells(9, _evidence(records))["Regular FT", "#Trainable Model"]
    assert cell["ours"] == TRAINABLE["full"]
    assert "count in 3 records, 109,483,778 to 109,484,547" in cell["source"]


def test_partial_average_is_not_comparable_and_names_its_tasks():
    records = [_record("bert_base", "full", task, seed, 0.8) for task in ("cola", "rte") for seed in (1, 2)]
    cell = _cells(9, _evidence(records))["Regular FT", "AVG"]
    assert (cell["ours"], cell["n"], cell["verdict"]) == (pytest.approx(80.0), 2, "not comparable")
    assert "over CoLA, RTE only (without STSB, MNLI, MRPC, QNLI, QQP, SST2)" in cell["source"]
    assert "the paper's mean over these is 63.20" in cell["source"]


def test_one_seed_has_no_interval_and_no_verdict():
    records = [_record("bert_base", "full", task, 1, 0.8) for task in TASKS]
    cells = _cells(9, _evidence(records))
    for column in ("CoLA", "AVG"):
        cell = cells["Regular FT", column]
        assert (cell["ours_low"], cell["ours_high"], cell["n"], cell["verdict"]) == (None, None, 1, "inconclusive")


def test_large_model_counts_three_runs_of_the_paper():
    scores = [0.921, 0.922, 0.923]
    records = [_record("roberta_large", "full", "stsb", seed, score) for seed, score in enumerate(scores)]
    assert layouts.PAPER_RUNS["roberta_large"] == 3
    # Welch's half width is about 1.2 points with three runs of the paper; with five it would be about 0.6.
    assert _cells(4, _evidence(records))["Regular FT", "STSB"]["verdict"] == "inconclusive"
    assert _cells(4, _evidence(records), margin=1.6)["Regular FT", "STSB"]["verdict"] == "agrees"


@pytest.mark.parametrize(
    ("changes", "protocol", "reason"),
    [
        ({"scale": "local"}, "printed", "scale local is not the paper's"),
        ({"random_weights": True}, "printed", "the model started from random weights"),
        ({"metric": "f1"}, "printed", "metric f1 is not accuracy"),
        ({"protocol": "sound"}, "sound", "protocol sound is not the paper's"),
    ],
)
def test_what_makes_a_score_not_comparable(changes, protocol, reason):
    cells = _cells(9, _evidence(_released(["full"], **changes), protocol=protocol))
    for column in ("RTE", "AVG"):
        assert cells["Regular FT", column]["verdict"] == "not comparable"
        assert reason in cells["Regular FT", column]["source"]
    count = cells["Regular FT", "#Trainable Model"]["verdict"]
    assert count == ("not comparable" if protocol == "sound" else "agrees")


def test_another_model_in_the_papers_place():
    records = [_record("minilm", "full", "rte", seed, 0.6 + seed / 100) for seed in (1, 2, 3)]
    rows, context = build_table(9, _evidence(records, stands_for={"bert_base": "minilm", "roberta_base": None}))
    cell = {(row["row"], row["column"]): row for row in rows}["Regular FT", "RTE"]
    assert (cell["ours"], cell["verdict"], cell["model"]) == (pytest.approx(62.0), "not comparable", "minilm")
    assert "minilm is not the paper's bert_base" in cell["source"]
    assert {row["verdict"] for row in rows} == {"not comparable", "not run"}
    assert "Title of minilm (minilm) stands in the place of BERT (bert_base). It is not" in context.models[0]
    places = build_table(5, _evidence(records, stands_for={"bert_base": "minilm", "roberta_base": None}))[1].models
    assert places[-1] == "Nothing ran in the place of RoBERTa-base (roberta_base)."


def test_failed_runs_are_counted_and_named():
    records = _released(["full"])
    records += [_record("bert_base", "full", "rte", 99, math.nan, status="failed")]
    records += [_record("bert_base", "lora", "rte", 1, None, status="failed")]
    rows, context = build_table(9, _evidence(records))
    cells = {(row["row"], row["column"]): row for row in rows}
    assert cells["Regular FT", "RTE"]["n"] == 5
    assert "1 failed run left out" in cells["Regular FT", "RTE"]["source"]
    assert cells["LoRA", "RTE"]["verdict"] == "not run"
    assert "failed runs: 1 (runs/bert_base-lora-rte-1.json)" in cells["LoRA", "RTE"]["source"]
    assert "Failed runs: 2 (runs/bert_base-full-rte-99.json, runs/bert_base-lora-rte-1.json)." in context.notes


def test_mixed_versions_are_flagged():
    records = _released(["full"]) + _released(["lora"], version=2)
    rows, context = build_table(9, _evidence(records))
    flagged = {row["row"] for row in rows if "mixed versions: this cell" in row["source"]}
    assert flagged == {"Regular FT", "LoRA"}
    assert any(note.startswith("Mixed versions of the configuration: 1, 2") for note in context.notes)
    rows, context = build_table(9, _evidence(_released(["full"])))
    assert not any("ixed versions" in text for text in [*context.notes, *(row["source"] for row in rows)])


def test_other_experiments_protocols_and_kinds_stay_out():
    records = [
        _record("bert_base", "full", "rte", 1, 0.6, experiment="other"),
        _record("bert_base", "full", "rte", 1, 0.7, protocol="sound"),
        _record("bert_base", "full", "rte", 1, 0.9, kind="ablation"),
        _record("bert_base", "full", "wnli", 1, 0.9),
        _record("bert_base", "full", "rte", 1, 0.8),
    ]
    rows, context = build_table(9, _evidence(records))
    cell = {(row["row"], row["column"]): row for row in rows}["Regular FT", "RTE"]
    assert (cell["ours"], cell["n"]) == (80.0, 1)
    note = next(note for note in context.notes if note.startswith("Records left out: 3"))
    assert all(text in note for text in ("experiment other", "protocol sound", "task wnli"))


def test_search_tables():
    searches = [
        _search("bert_base", "sparsegrad", "rte", {"learning_rate": 1e-4, "batch_size": 16, "value": 0.7, "trial": 1}),
        _search("bert_base", "sparsegrad", "cola", {"learning_rate": 1e-4, "batch_size": 16, "value": 0.7, "trial": 1}),
        _search("bert_base", "sparsegrad", "sst2", None),
    ]
    cells = _cells(13, _evidence(searches=searches))
    rate = cells["RTE", "learning rate"]
    assert (rate["ours"], rate["paper"], rate["released"], rate["n"]) == (1e-4, "6.81e-5", 6.81e-5, 2)
    assert rate["verdict"] == cells["RTE", "batch size"]["verdict"] == "agrees"
    assert rate["records"] == "search/bert_base-sparsegrad-rte.json"
    assert "best of 3 trials (2 complete, 1 pruned)" in rate["source"]
    assert cells["CoLA", "learning rate"]["verdict"] == cells["CoLA", "batch size"]["verdict"] == "differs"
    assert cells["SST2", "learning rate"]["verdict"] == "not run"
    assert "none of 3 trials" in cells["SST2", "learning rate"]["source"]
    assert cells["STSB", "learning rate"]["source"].split("; ")[1] == "no search of bert_base (sparsegrad)"
    assert {row["verdict"] for row in _cells(14, _evidence(searches=searches)).values()} == {"not run"}


def test_search_of_another_model_or_scale():
    best = {"learning_rate": 6.81e-5, "batch_size": 16, "value": 0.7, "trial": 1}
    searches = [
        _search("minilm", "sparsegrad", "rte", best),
        _search("bert_base", "sparsegrad", "rte", best, scale="local"),
    ]
    for model in ("minilm", "bert_base"):
        rows, context = build_table(13, _evidence(searches=searches, stands_for={"bert_base": model}))
        assert {row["verdict"] for row in rows if row["row"] == "RTE"} == {"not comparable"}
        assert ("stands in the place" in context.models[0]) == (model == "minilm")


def _broken(**changes):
    path, record = _record("bert_base", "full", "rte", 1, 0.5)
    return [(path, {name: value for name, value in (record | changes).items() if value != "absent"})]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (_broken(score=math.nan), r"score is nan; .*finite score in \[-1, 1\]"),
        (_broken(score=None), r"score is None"),
        (_broken(score=71.0), r"not percent"),
        (_broken(score="absent"), r"runs/bert_base-full-rte-1.json: there is no 'score'"),
        (_broken(run={"kind": "train"}), r"there is no 'run.model'"),
        (_broken(status="running"), r"status='running'; .*'finished' or 'failed'"),
        (_broken(schema=2), r"schema=2"),
        (_broken(parameters={"trainable": -1, "trainable_per_layer": 1.0}), r"counts >= 0"),
        ([("x.json", [])], r"x.json: there is no 'run.kind'"),
        (_broken() + _broken(), r"two record files of \('bert_base', 'full', 'rte', 1\)"),
    ],
)
def test_bad_records(records, message):
    with pytest.raises(ValueError, match=message):
        _evidence(records)


def test_bad_searches_models_and_places():
    best = {"learning_rate": 1e-4, "batch_size": 16}
    with pytest.raises(ValueError, match="two search files"):
        _evidence(searches=[_search("bert_base", "full", "rte", best)] * 2)
    with pytest.raises(ValueError, match="above 0"):
        _evidence(searches=[_search("bert_base", "full", "rte", best | {"learning_rate": 0})])
    with pytest.raises(ValueError, match="two model configuration files"):
        _evidence(models=[("a.yaml", {"name": "bert_base"}), ("b.yaml", {"name": "bert_base"})])
    with pytest.raises(ValueError, match="its keys are the paper's models"):
        _evidence(stands_for={"bert": "minilm"})


def _variant(name, seed, kept, *, task="cola", side=3072, **changes):
    path, record = _record("bert_base", name, task, seed, 0.59 + seed / 1000, **changes)
    architecture = {"hidden_size": side // 4, "intermediate_size": side}
    method = {"name": name} | ({"base": "sparsegrad"} if name != "sparsegrad" else {})
    record["parameters"]["trainable_per_layer"] = kept
    return path, record | {"config": {"method": method, "model": {"architecture": architecture}}}


def test_table_11_from_variants():
    kept = {"sparsegrad": 28_000, "sparsegrad_18k": 18_000, "sparsegrad_30k": 30_000, "sparsegrad_100k": 100_000}
    records = [_variant(name, seed, k) for name, k in kept.items() for seed in (1, 2, 3)]
    rows, context = build_table(11, _evidence(records))
    cells = {(row["row"], row["column"]): row for row in rows}
    assert cells["0.8", "CoLA"]["ours"] == pytest.approx(59.2) and cells["0.8", "CoLA"]["released"] is None
    assert cells["0.8", "CoLA"]["verdict"] == "agrees"  # 59.1 ± 0.5 printed
    assert [cells["1", column]["verdict"] for column in ("k per layer", "AVG", "CoLA")] == ["not run"] * 3
    shares = {row: cells[row, "k per layer"] for row in ("100", "0.8", "1.2", "4.2")}
    assert [found["ours"] for found in shares.values()] == [28_000, 18_000, 30_000, 100_000]
    assert [found["verdict"] for found in shares.values()] == ["differs", "agrees", "differs", "agrees"]
    assert "0.763 % of 2,359,296 entries" in shares["0.8"]["source"]
    assert "1.272 % rounds to 1.3, the label says 1.2 (cut off, not rounded)" in shares["1.2"]["source"]
    assert "1.187 % rounds to 1, the label says 100 (neither" in shares["100"]["source"]
    assert "the paper's mean over these is 59.10" in cells["0.8", "AVG"]["source"]
    assert cells["100", "CoLA"]["released"] == pytest.approx(58.77, abs=0.005)
    text = writers.to_markdown(11, rows, context)
    assert "92.4 ± 0.1 (inferred)" in text and "18000 (inferred)" in text and "59.1 ± 0.5 (" not in text


def test_variants_are_known_by_their_records():
    records = [_variant("truncated", 1, 28_000)]
    path, record = _variant("other", 1, 28_000)
    record["config"]["method"]["base"] = "adapter"
    best = {"learning_rate": 1e-4, "batch_size": 16}
    evidence = _evidence([*records, (path, record)], searches=[_search("bert_base", "truncated", "cola", best)])
    assert evidence.bases == {"truncated": "sparsegrad"}
    assert set(evidence.runs) == set(evidence.searches) == {("bert_base", "truncated", "cola")}
    assert evidence.left_out == {"bert_base": (f"{path} (method other)",)}


def test_shares_of_another_width_are_what_is_compared():
    records = [_variant("sparsegrad_18k", seed, 4_500, side=1536) for seed in (1, 2)]
    cell = _cells(11, _evidence(records))["0.8", "k per layer"]
    assert (cell["ours"], cell["verdict"]) == (4_500, "agrees")
    records += [_variant("sparsegrad_18k", 3, 45_000, side=1536)]
    cell = _cells(11, _evidence(records))["0.8", "k per layer"]
    assert cell["verdict"] == "not comparable" and "records disagree" in cell["source"]
    _, record = _record("bert_base", "sparsegrad", "cola", 1, 0.5)
    cell = _cells(11, _evidence([("a.json", record)]))["100", "k per layer"]
    assert cell["verdict"] == "not comparable"  # without a configuration the share is not known


def test_inferred_and_unknown_cells_are_compared_with_nothing():
    names = [("sparsegrad", 28_000), ("sparsegrad_18k", 18_000)]
    records = [_variant(name, seed, k, task=task) for name, k in names for seed in (1, 2, 3) for task in TASKS]
    cells = _cells(11, _evidence(records))
    inferred, unknown = cells["100", "SST2"], cells["0.8", "SST2"]
    assert inferred["paper"] == "92.4" and inferred["verdict"] == unknown["verdict"] == "not comparable"
    assert "its value is inferred, not printed" in inferred["source"]
    assert "the paper prints no value" in unknown["source"]
    # The average's verdict needs a deviation of every task; the one of SST2 is not printed.
    assert cells["100", "AVG"]["verdict"] == cells["0.8", "AVG"]["verdict"] == "inconclusive"


def test_faults_of_tables_11_and_12_are_found():
    notes = {number: build_table(number, _evidence())[1].notes for number in (11, 12)}

    def named(number, *texts):
        return [note for note in notes[number] if all(text in note for text in texts)]

    assert named(11, "Row 100: every printed score and deviation is that of table 9, SparseGrad")
    assert named(12, "Row 100: every printed score and deviation is that of table 10, SparseGrad")
    assert named(12, "Row 1.4 (printed; 100k is 4.2): 100,000 is 4.239 %; the label is another share")
    assert named(12, "Row 100, AVG as printed (83.6): does not follow", "91.55 to 93.05", "with 94.2")
    assert named(12, "Row 0.8, AVG as printed (83.4): follows only with an odd cell", "98.25 to 99.75")
    assert named(11, "Row 100, AVG as printed (82.6): follows:")
    assert named(11, "Inferred, not printed", "row 100 SST2 92.4") and named(12, "Not known: row 0.8 SST2.")


@pytest.mark.parametrize("number", [0, 2, 3, 16])
def test_unknown_table(number):
    with pytest.raises(ValueError, match="unknown table number"):
        build_table(number, _evidence())


@pytest.mark.parametrize(
    ("text", "value", "rounding", "exact", "rounded", "truncated"),
    [
        ("82.5", 82.5, 0.05, 82.45, "82.5", "82.4"),
        ("109 M", 109e6, 0.5e6, 109_482_240, "109 M", "109 M"),
        ("6.7 B", 6.7e9, 0.05e9, 6_738_415_616, "6.7 B", "6.7 B"),
        ("0.05 mln", 5e4, 5e3, 51_200, "0.05 mln", "0.05 mln"),
        ("25%", 25, 0.5, 25.89, "26%", "25%"),
        ("1.24e-4", 1.24e-4, 5e-7, 1.249e-4, "0.000125", "0.000124"),
        ("32", 32, 0.5, 16, "16", "16"),
    ],
)
def test_printed_numbers(text, value, rounding, exact, rounded, truncated):
    number = printed.parse(text)
    assert (number.value, number.rounding) == (pytest.approx(value), pytest.approx(rounding))
    assert (number.round(exact).text, number.truncate(exact).text) == (rounded, truncated)


def test_unreadable_print():
    assert printed.parse("") is None
    with pytest.raises(ValueError, match="cannot read 'about 5'"):
        printed.parse("about 5")


def _row(row, column, **values):
    base = dict.fromkeys(COLUMNS) | {"row": row, "column": column, "paper": "", "paper_std": "", "verdict": "not run"}
    return base | {"source": "", "protocol": "printed", "model": "", "records": ""} | values


SMALL = [
    _row("Regular FT", "#Trainable", ours=109483778, paper="109 mln", verdict="agrees"),
    _row("Regular FT", "CoLA", ours=58.964, ours_low=55.85, ours_high=62.08, n=5, paper="59.0", paper_std="1.9")
    | {"released": 58.9638, "verdict": "inconclusive", "source": 'a "b", c', "records": "a.json;b.json"},
    _row("A_B & 50% | c", "CoLA"),
]
CONTEXT = Context("local", "printed", "BERT on GLUE", ("BERT is the paper's own model.",), ("Failed runs: none.",))


def test_csv_of_a_small_table():
    assert writers.to_csv(SMALL) == (
        "row,column,ours,ours_low,ours_high,n,paper,paper_std,released,source,verdict,protocol,model,records\n"
        "Regular FT,#Trainable,109483778,,,,109 mln,,,,agrees,printed,,\n"
        'Regular FT,CoLA,58.964,55.85,62.08,5,59.0,1.9,58.9638,"a ""b"", c",inconclusive,printed,,a.json;b.json\n'
        "A_B & 50% | c,CoLA,,,,,,,,,not run,printed,,\n"
    )


def test_markdown_of_a_small_table():
    assert (
        writers.to_markdown(9, SMALL, CONTEXT)
        == r"""# Table 9 of the paper: BERT on GLUE (experiment local, protocol printed)

BERT is the paper's own model.

Each cell: ours [95 % interval] and the verdict's mark | the paper's ± its deviation | the authors' released logs'.

|  | #Trainable | CoLA |
| --- | --- | --- |
| Regular FT | 109,483,778 = \| 109 mln | 58.96 [55.85, 62.08] ? \| 59.0 ± 1.9 \| released 58.96 |
| A_B & 50% \| c | – | not run \| not printed |

Notes

- Verdicts: = agrees (1), ≠ differs (0), ? inconclusive (1), n/c not comparable (0), – not run (1).
- n (runs, or completed trials of a search): 5.
- Not run: A_B & 50% | c (CoLA).
- Failed runs: none.
- Every cell's sources and records are in the CSV file of the same name.
"""
    )


def test_latex_of_a_small_table():
    lines = writers.to_latex(9, SMALL, CONTEXT).splitlines()
    start, end = lines.index(r"\begin{tabular}{llrr}"), lines.index(r"\end{tabular}")
    assert lines[start + 1 : end] == [
        r"\toprule",
        r" &  & \#Trainable & CoLA \\",
        r"\midrule",
        r"Regular FT & ours & 109,483,778 & 58.96 \\",
        r" & 95 \% interval &  & {[55.85, 62.08]} \\",
        r" & paper & 109 mln & 59.0 $\pm$ 1.9 \\",
        r" & released &  & 58.96 \\",
        r" & verdict & = & ? \\",
        r"\addlinespace",
        r"A\_B \& 50\% \textbar{} c & verdict &  & -- \\",
        r"\bottomrule",
    ]
    assert lines[2] == (
        r"\caption{Table 9 of the paper: BERT on GLUE (experiment local, protocol printed). "
        r"BERT is the paper's own model.}"
    )


@pytest.mark.parametrize("number", TABLES)
def test_latex_is_balanced_and_every_line_has_all_columns(number):
    rows, context = build_table(number, _evidence(_released()))
    text = writers.to_latex(number, rows, context)
    width = len(dict.fromkeys(row["column"] for row in rows))
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert body and {line.replace(r"\&", "").count("&") for line in body} == {width + 1}
    plain = text.replace(r"\{", "").replace(r"\}", "")
    assert plain.count("{") == plain.count("}")
    assert plain.count(r"\begin") == plain.count(r"\end") == 2
    assert text.isascii()


def test_written_files_read_back(tmp_path):
    rows, context = build_table(9, _evidence(_released()))
    paths = write_table(tmp_path / "tables", 9, rows, context)
    assert [path.name for path in paths] == ["table_09.csv", "table_09.md", "table_09.tex"]
    with paths[0].open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["row"], row["column"], row["verdict"]) for row in found] == [
        (row["row"], row["column"], row["verdict"]) for row in rows
    ]
    assert float(found[2]["ours"]) == pytest.approx(rows[2]["ours"])
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [path.name for path in paths]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_table(tmp_path / "tables", 9, rows, context)] == before


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    rows, context = build_table(13, _evidence())
    paths = write_table(tmp_path, 13, rows, context)
    before = paths[0].read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_table(tmp_path, 13, rows[:1], context)
    assert paths[0].read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table_13.csv", "table_13.md", "table_13.tex"]


@pytest.mark.parametrize(
    ("number", "rows", "message"),
    [
        (2, SMALL, "unknown table number 2"),
        (9, [], "got no rows"),
        (9, [{"row": "x"}], "a row has the keys"),
        (9, [SMALL[0] | {"verdict": "fine"}], "verdict 'fine'; allowed are agrees"),
        (9, [SMALL[0], SMALL[0]], "two rows of the cell"),
    ],
)
def test_bad_rows_write_nothing(tmp_path, number, rows, message):
    with pytest.raises(ValueError, match=message):
        write_table(tmp_path, number, rows, CONTEXT)
    assert not list(tmp_path.iterdir())


def test_importing_the_tables_does_not_import_torch():
    code = (
        "import sys, finetune.report.tables.tables; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "src")}).returncode == 0
    )
