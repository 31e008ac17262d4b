"""Tables 3, 7 and 8 from records of the efficiency stage, made up here."""

import csv
import json
import math

import pytest

from finetune.published import TASKS, paper_table
from finetune.report.evidence.efficiency_evidence import collect_efficiency_evidence
from finetune.report.tables.efficiency_tables import OWN_ROWS, ROWS, build_efficiency_table, cells
from finetune.report.tables.rows import COLUMNS
from finetune.report.tables.writers import write_table

PEAKS = {
    "full": (400, 300),
    "lora": (320, 210),
    "meprop": (390, 250),
    "rotated_regular": (380, 270),
    "rotated_sparse_by_dense": (360, 240),
    "folded": (350, 260),
    "truncated": (300, 200),
}
RATES = {name: [rate, rate + 0.2] for rate, name in enumerate(PEAKS, start=2)}


def variant(name, **changes):
    full, own = RATES["full"], RATES[name]
    training, evaluation = PEAKS[name]
    return {
        "name": name,
        "status": "finished",
        "reason": None,
        "rounds": own,
        "ratio_to_full": {"rounds": [a / b for a, b in zip(own, full, strict=True)]},
        "memory": {"peak_training": training * 1e6, "peak_evaluation": evaluation * 1e6},
    } | changes


def record(task="cola", model="minilm", names=tuple(PEAKS), **changes):
    run = {"experiment": "test", "kind": "efficiency", "model": model, "task": task, "protocol": "sound"}
    treatment = {
        "batch_size": 32,
        "precision": "fp32",
        "padding": "longest",
        "max_length": 128,
        "optimizer": "AdamW",
        "train": "all",
        "kept": "all variants in memory",
        "rounds": 2,
        "batches": 3,
        "warmup_steps": 1,
    }
    return {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "run": run | {"scale": "local", "config_hash": "a"} | changes.pop("run", {}),
        "model": {"title": "MiniLM-L6"},
        "treatment": treatment,
        "lengths": {"padded_share": 0.31, "source": f"glue {task}"},
        "device": {"name": "a CPU", "type": "cpu", "threads": 2},
        "warnings": [],
        "variants": [variant(name) for name in names],
    } | changes


@pytest.fixture
def build():
    """``build(7, record(), ...)``: cells by (row, column), the rows, and the context."""

    def make(number, *found, models=("minilm",)):
        evidence = collect_efficiency_evidence(
            experiment="test",
            protocol="sound",
            models=list(models),
            records=[(f"results/{place}.json", one) for place, one in enumerate(found)],
        )
        rows, context = build_efficiency_table(number, evidence)
        return {(row["row"], row["column"]): row for row in rows}, rows, context

    return make


@pytest.mark.parametrize("number", [3, 7, 8])
def test_labels_and_numbers_of_the_print_stand_first(number, build):
    _, rows, _ = build(number, record())
    printed = [(line["row"], line["column"], line["value"]) for line in paper_table(number)]
    columns = {line["column"] for line in paper_table(number)}
    own = [row for row in rows if row["column"] in columns]
    assert [(row["row"], row["column"], row["paper"]) for row in own][: len(printed)] == printed
    assert all(set(row) == set(COLUMNS) for row in rows)
    assert {row["verdict"] for row in rows} <= {"not comparable", "not run"}
    assert set(OWN_ROWS) <= {row["row"] for row in rows}


def test_speed_has_an_interval_over_rounds(build):
    found, _, _ = build(7, record())
    cell = found["LoRA", "CoLA"]
    assert cell["ours"] == pytest.approx(3.1) and cell["n"] == 2 and cell["paper"] == "5.8"
    assert cell["ours_low"] == pytest.approx(3.1 - 12.7062 * 0.1, rel=1e-4)
    assert cell["model"] == "minilm" and cell["records"] == "results/0.json"
    for text in ("minilm is not the paper's roberta_base", "a CPU, batch 32: the paper names neither", "(D22)"):
        assert text in cell["source"]
    missing = found["LoRA", "QNLI"]
    assert missing["verdict"] == "not run" and "no record of minilm on QNLI" in missing["source"]


def test_ratios_to_full_stand_beside_quotients_of_the_print(build):
    found, _, _ = build(7, record())
    cell = found["LoRA / Regular FT", "CoLA"]
    assert cell["ours"] == pytest.approx((3 / 2 + 3.2 / 2.2) / 2) and cell["paper"] == f"{5.8 / 4.3:.2f}"
    assert "5.8 / 4.3" in cell["source"]
    memory, _, _ = build(8, record())
    assert memory["SparseGrad, folded / Regular FT", "CoLA"]["ours"] == pytest.approx(260 / 300)
    assert memory["SparseGrad, folded / Regular FT, peak in training", "CoLA"]["ours"] == pytest.approx(350 / 400)
    assert ("Regular FT / Regular FT", "CoLA") not in memory


def test_memory_is_the_peak_of_an_evaluation_and_of_training_beside(build):
    found, _, context = build(8, record())
    assert found["SparseGrad, Regular", "CoLA"]["ours"] == 270 and found["SparseGrad, Regular", "CoLA"]["n"] == 1
    assert found["SparseGrad, Regular, peak in training", "CoLA"]["ours"] == 380
    assert found["SparseGrad, Regular", "CoLA"]["ours_low"] is None
    assert any("peak of an evaluation" in note and "D21" in note for note in context.notes)
    table, _, context = build(3, record())
    assert table["LoRA", "Memory, MB"]["ours"] == 210 and table["LoRA", "Peak in training, MB"]["ours"] == 320
    assert table["LoRA", "Peak in training, MB"]["paper"] == ""
    assert any("D21" in note for note in context.notes) and any("D22" in note for note in context.notes)


def test_averages_are_over_the_tasks_that_ran(build):
    other = record("mrpc", variants=[variant("full", rounds=[4.0, 4.0]), variant("lora", rounds=[5.0, 5.0])])
    found, _, _ = build(3, record(), other)
    cell = found["LoRA", "Steps/Sec."]
    assert cell["ours"] == pytest.approx((3.1 + 5) / 2) and cell["n"] == 2 and cell["ours_low"] <= cell["ours"]
    assert "over CoLA, MRPC only, the paper's mean over these is 6.05" in cell["source"]
    assert cell["records"] == "results/0.json;results/1.json"
    folded = found["SparseGrad, folded", "Steps/Sec."]
    assert folded["records"] == "results/0.json" and "over CoLA only" in folded["source"]
    whole, _, _ = build(3, *[record(task) for task in TASKS])
    assert "only" not in whole["LoRA", "Steps/Sec."]["source"]


def test_a_variant_that_was_not_measured_says_why(build):
    reason = "sparsegrad has no form 'truncated' yet; it has folded, rotated"
    without = [variant(name) for name in PEAKS if name != "truncated"]
    skipped = {"name": "truncated", "status": "skipped", "reason": reason}
    found, _, context = build(7, record(variants=[*without, skipped]))
    cell = found["SparseGrad, truncated", "CoLA"]
    assert cell["verdict"] == "not run" and cell["ours"] is None and reason in cell["source"]
    assert any(note == f"Not measured, truncated: {reason} (CoLA)." for note in context.notes)
    lonely, _, _ = build(7, record(names=["lora"]))
    assert lonely["LoRA", "CoLA"]["ours"] == pytest.approx(3.1)
    assert lonely["LoRA / Regular FT", "CoLA"]["verdict"] == "not run"


def test_notes_name_machine_treatment_padding_and_warnings(build):
    warned = record(warnings=["load average 9.0 on 2 cores before measuring: other processes ran beside it"])
    _, _, context = build(7, warned)
    text = "\n".join(context.notes)
    for part in ("a CPU (cpu, 2 threads), fp32, batch 32, padding longest", "Warning: load average 9.0", "CoLA 31 %"):
        assert part in text
    assert "does not match" in text and "glue cola" in text
    assert "MiniLM-L6 (minilm) stands in the place of RoBERTa-base" in context.models[0]
    _, _, paper = build(3, record(model="roberta_base"), models=["roberta_base"])
    assert "the paper's own model, with random weights" in paper.models[0]


def test_on_the_papers_model_the_reason_is_the_machine(build):
    found, _, _ = build(7, record(model="roberta_base", run={"scale": "paper"}), models=["roberta_base"])
    source = found["LoRA", "CoLA"]["source"]
    assert found["LoRA", "CoLA"]["verdict"] == "not comparable" and "batch 32: the paper names neither" in source
    assert "is not the paper's" not in source


def test_records_of_others_are_left_out_and_named(build):
    others = [
        record(run={"experiment": "else"}),
        record(run={"protocol": "printed"}),
        record(model="tiny_bert"),
        record(task="wnli"),
        record(run={"kind": "train"}),
        record() | {"status": "failed"},
    ]
    found, _, context = build(7, *others)
    assert found["LoRA", "CoLA"]["verdict"] == "not run"
    (note,) = [note for note in context.notes if note.startswith("Records left out")]
    for text in ("experiment else", "protocol printed", "model tiny_bert", "task wnli", "failed"):
        assert text in note
    assert "results/4.json" not in note


def test_nothing_measured_says_so(build):
    found, rows, context = build(3, models=[])
    assert {row["verdict"] for row in rows} == {"not run"}
    assert "nothing was measured in RoBERTa-base's place" in found["LoRA", "Steps/Sec."]["source"]
    assert "Nothing was measured" in context.models[0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda one: one["variants"][0].pop("rounds"), "there is no 'rounds'"),
        (lambda one: one["variants"][0].update(rounds=[]), "at least one round"),
        (lambda one: one["variants"][0].update(rounds=[math.inf]), "numbers above 0"),
        (lambda one: one["variants"][0]["memory"].update(peak_training=0), "numbers above 0"),
        (lambda one: one["device"].pop("name"), "device.name"),
        (lambda one: one.pop("variants"), "there is no 'variants'"),
    ],
)
def test_a_damaged_record_is_refused(change, text, build):
    one = json.loads(json.dumps(record()))
    change(one)
    with pytest.raises(ValueError, match=text):
        build(7, one)


def test_two_records_of_a_task_are_refused(build):
    with pytest.raises(ValueError, match=r"two record files of \('minilm', 'cola'\)"):
        build(7, record(), record())


def test_another_table_is_refused():
    with pytest.raises(ValueError, match="unknown table number 5"):
        cells(5)


@pytest.mark.parametrize("number", [3, 7, 8])
def test_files_are_written(number, build, tmp_path):
    _, rows, context = build(number, record(), record("mrpc"))
    paths = write_table(tmp_path, number, rows, context)
    assert [path.suffix for path in paths] == [".csv", ".md", ".tex"]
    with paths[0].open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    page = paths[1].read_text()
    assert page.startswith(f"# Table {number} of the paper:") and " / Regular FT | " in page


def test_every_printed_row_is_known():
    labels = {line["row"] for number in (3, 7, 8) for line in paper_table(number)}
    assert labels == set(ROWS)


# The score beside the speed


def test_table_3_prints_what_each_way_of_training_reached_beside_its_speed():
    from finetune.report.evidence.efficiency_evidence import EfficiencyEvidence
    from finetune.report.tables.efficiency_tables import build_efficiency_table

    scores = {
        ("folded", "cola"): (("runs/a.json", 40.0), ("runs/b.json", 44.0)),
        ("folded", "mrpc"): (("runs/c.json", 80.0),),
    }
    evidence = EfficiencyEvidence("test", "sound", "tiny", {}, (), scores)
    rows, _ = build_efficiency_table(3, evidence)
    column = {row["row"]: row for row in rows if row["column"] == "Score"}
    assert column["SparseGrad, folded"]["ours"] == pytest.approx((42 + 80) / 2)
    assert column["SparseGrad, folded"]["records"] == "runs/a.json;runs/b.json;runs/c.json"
    assert column["LoRA"]["ours"] is None and "no finished training run of lora on tiny" in column["LoRA"]["source"]
    assert not any("/" in row for row in column)  # a ratio of scores says nothing
    assert all(row["column"] != "Score" for number in (7, 8) for row in build_efficiency_table(number, evidence)[0])
