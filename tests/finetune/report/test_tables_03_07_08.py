"""Tables 3, 7 and 8 from records of the efficiency stage, made up here."""

import copy
import math

import pytest

from finetune.published import TASKS, paper_table
from finetune.report.evidence.efficiency_evidence import collect_efficiency_evidence
from finetune.report.evidence.evidence import Evidence, Run
from finetune.report.evidence.experiment import Experiment
from finetune.report.labels import Labels
from finetune.report.paper.layouts import VARIANTS
from finetune.report.tables.tables import build_table
from finetune.store.catalog import MethodFacts

PEAKS = {
    "full": (400, 300),
    "lora": (320, 210),
    "meprop": (390, 250),
    "rotated_regular": (380, 270),
    "rotated_sparse_by_dense": (360, 240),
    "folded": (350, 260),
    "truncated": (300, 200),
    "dora": (330, 220),
}
FORMS = {
    "rotated_regular": "rotated",
    "rotated_sparse_by_dense": "rotated",
    "folded": "folded",
    "truncated": "truncated",
}
LABELS = Labels({name: MethodFacts(name, name.upper(), name) for name in ("meprop", "dora")}, TASKS | {"wnli": "WNLI"})
RATES = {name: [rate, rate + 0.2] for rate, name in enumerate(PEAKS, start=2)}


def variant(name, **changes):
    training, evaluation = PEAKS[name]
    return {
        "name": name,
        "method": "sparsegrad" if name in FORMS else name,
        "form": FORMS.get(name, ""),
        "status": "finished",
        "rounds": RATES[name],
        "ratio_to_full": {"rounds": [a / b for a, b in zip(RATES[name], RATES["full"], strict=True)]},
        "memory": {"peak_training": training * 1e6, "peak_evaluation": evaluation * 1e6},
    } | changes


def record(task="cola", model="minilm", names=tuple(PEAKS), **changes):
    treatment = "precision padding max_length optimizer train kept rounds batches warmup_steps".split()
    run = {"experiment": "test", "kind": "efficiency", "model": model, "task": task, "protocol": "sound"}
    return {
        "schema": 1,
        "status": "finished",
        "run": run | {"scale": "local"} | changes.pop("run", {}),
        "model": {"title": "MiniLM-L6"},
        "treatment": dict.fromkeys(treatment, "x") | {"batch_size": 32},
        "lengths": {"padded_share": 0.31, "source": f"glue {task}"},
        "device": {"name": "a CPU", "type": "cpu", "threads": 2},
        "warnings": [],
        "variants": [variant(name) for name in names],
    } | changes


def built(number, *found, models=("minilm",), runs=(), tasks=tuple(TASKS)):
    experiment = Experiment("test", "sound", {}, tasks=tasks, efficiency_models=models, labels=LABELS)
    records = [(f"results/{place}.json", one) for place, one in enumerate(found)]
    evidence = Evidence(experiment, runs=dict(runs))
    return build_table(number, evidence, collect_efficiency_evidence(experiment, records))


def kinds(cell):
    return {reason.kind for reason in cell.reasons}


@pytest.mark.parametrize("number", [3, 7, 8])
def test_labels_of_the_print_stand_first_and_other_variants_below(number):
    table = built(number, record())
    printed = {(line["row"], line["column"]): line["value"] for line in paper_table(number)}
    assert {place: table.cell(*place).paper for place in printed} == printed
    rows = list(dict.fromkeys(row for row, _ in printed))
    own = ["MEPROP", "SparseGrad, folded", "SparseGrad, truncated", "DORA"]
    ratios = [f"{row} / Regular FT" for row in (*rows, *own) if row != "Regular FT"]
    assert list(table.rows)[: len(rows) + len(own) + len(ratios)] == [*rows, *own, *ratios]
    assert {cell.verdict for cell in table.cells} <= {"not comparable", "not run"}
    assert {row for row, _ in printed} <= set(VARIANTS)


def test_speed_has_an_interval_over_rounds():
    table = built(7, record())
    cell = table.cell("LoRA", "CoLA")
    assert (cell.value, cell.n, cell.paper, cell.quantity) == (pytest.approx(3.1), 2, "5.8", "speed")
    assert cell.low == pytest.approx(3.1 - 12.7062 * 0.1, rel=1e-4)
    assert (cell.model, cell.records, cell.method, cell.task) == ("minilm", ("results/0.json",), "lora", "cola")
    assert kinds(cell) == {"other_model", "scale", "machine", "counting"}
    missing = table.cell("LoRA", "QNLI")
    assert missing.verdict == "not run" and kinds(missing) == {"no_record"}
    own = built(7, record(model="roberta_base", run={"scale": "paper"}), models=("roberta_base",))
    assert kinds(own.cell("LoRA", "CoLA")) == {"machine", "counting"} and "the paper's own model" in own.models[0]


def test_ratios_to_full_stand_beside_quotients_of_the_print():
    cell = built(7, record()).cell("LoRA / Regular FT", "CoLA")
    assert cell.value == pytest.approx((3 / 2 + 3.2 / 2.2) / 2) and cell.paper == f"{5.8 / 4.3:.2f}"
    assert "5.8 / 4.3" in cell.sources["paper"] and cell.flags == ("over_full",)
    memory = built(8, record())
    assert memory.cell("SparseGrad, folded / Regular FT", "CoLA").value == pytest.approx(260 / 300)
    assert memory.cell("SparseGrad, folded / Regular FT, peak in training", "CoLA").value == pytest.approx(350 / 400)
    assert memory.cell("Regular FT / Regular FT", "CoLA") is None


def test_memory_is_the_peak_of_an_evaluation_and_of_training_beside():
    table = built(8, record())
    cell = table.cell("SparseGrad, Regular", "CoLA")
    assert (cell.value, cell.n, cell.low) == (270, 1, None) and "evaluation" in kinds(cell)
    assert table.cell("SparseGrad, Regular, peak in training", "CoLA").value == 380
    three = built(3, record())
    training = three.cell("LoRA", "Peak in training, MB")
    assert three.cell("LoRA", "Memory, MB").value == 210 and (training.value, training.paper) == (320, "")
    text = "".join(note.text for note in three.notes if note.kind == "print")
    assert "D21" in text and "D22" in text


def test_averages_are_over_the_papers_tasks_that_ran():
    other = record("mrpc", variants=[variant("full", rounds=[4.0, 4.0]), variant("lora", rounds=[5.0, 5.0])])
    table = built(3, record(), other, record("wnli", variants=[variant("lora", rounds=[90.0])]), tasks=(*TASKS, "wnli"))
    cell = table.cell("LoRA", "Steps/Sec.")
    assert (cell.value, cell.n) == (pytest.approx((3.1 + 5) / 2), 2) and cell.low <= cell.value
    (reason,) = [one for one in cell.reasons if one.kind == "partial_average"]
    assert "6.05" in reason.text  # the paper's mean over these
    assert cell.records == ("results/0.json", "results/1.json")
    assert table.cell("SparseGrad, folded", "Steps/Sec.").records == ("results/0.json",)
    whole = built(3, *[record(task) for task in TASKS]).cell("LoRA", "Steps/Sec.")
    assert "partial_average" not in kinds(whole)
    seven = built(7, record(), record("wnli"), tasks=("cola", "wnli"))
    assert seven.columns[-1] == "WNLI" and seven.cell("LoRA", "WNLI").value == pytest.approx(3.1)


def test_a_variant_that_was_not_measured_says_why():
    without = [variant(name) for name in PEAKS if name != "truncated"]
    skipped = {"name": "truncated", "status": "skipped", "reason": "no such form"}
    table = built(7, record(variants=[*without, skipped]))
    cell = table.cell("SparseGrad, truncated", "CoLA")
    assert (cell.verdict, cell.value, kinds(cell)) == ("not run", None, {"skipped"})
    assert "Not measured, truncated: no such form (CoLA)." in [note.text for note in table.notes]
    lonely = built(7, record(names=["lora"]))
    assert lonely.cell("LoRA", "CoLA").value == pytest.approx(3.1)
    assert lonely.cell("LoRA / Regular FT", "CoLA").verdict == "not run"


def test_notes_name_machine_and_warnings():
    table = built(7, record(warnings=["load average 9.0"]))
    assert [note.text for note in table.notes if note.kind == "warning"] == ["load average 9.0."]
    machine = [note.text for note in table.notes if note.kind == "machine"]
    assert "a CPU (cpu, 2 threads)" in machine[0] and "CoLA 31 %" in machine[1] and "glue cola" in machine[2]
    assert "MiniLM-L6 (minilm) stands in the place of RoBERTa-base" in table.models[0]


def test_records_of_others_are_left_out_and_named():
    others = [record(run={"experiment": "else"}), record(run={"protocol": "printed"}), record(model="tiny_bert")]
    others += [record(task="wnli"), record(run={"kind": "train"}), record() | {"status": "failed"}]
    table = built(7, *others)
    assert table.cell("LoRA", "CoLA").verdict == "not run"
    (note,) = [one.text for one in table.notes if one.text.startswith("Records left out")]
    assert all(
        text in note for text in ("experiment else", "protocol printed", "model tiny_bert", "task wnli", "failed")
    )
    assert "results/4.json" not in note
    nothing = built(3, models=())
    assert {(cell.verdict, *kinds(cell)) for cell in nothing.cells} == {("not run", "no_model")}


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
def test_a_damaged_record_is_refused(change, text):
    one = copy.deepcopy(record())
    change(one)
    with pytest.raises(ValueError, match=text):
        built(7, one)
    with pytest.raises(ValueError, match=r"two record files of cola"):
        built(7, record(), record())


def test_table_3_says_what_each_way_of_training_reached_beside_its_speed():
    def runs(method, task, *scores):
        facts = ("accuracy", "local", 1, False, 1, 1.0)
        found = [Run(f"{method}-{task}-{s}", "minilm", "M", task, s, score, *facts) for s, score in enumerate(scores)]
        return ("minilm", method, task), tuple(found)

    table = built(3, record(), runs=[runs("sparsegrad", "cola", 40.0, 44.0), runs("sparsegrad", "mrpc", 80.0)])
    cell = table.cell("SparseGrad, folded", "Score")
    assert cell.value == pytest.approx((42 + 80) / 2) and len(cell.records) == 3  # the folded form takes its steps
    assert kinds(table.cell("LoRA", "Score")) == kinds(table.cell("SparseGrad, truncated", "Score")) == {"no_run"}
    assert not any(cell.column == "Score" and "over_full" in cell.flags for cell in table.cells)
