"""Training steps of all modes: what tables and figure show is what records hold, made up here or committed."""

import json
from pathlib import Path

import pytest

from finetune.published import TASKS
from finetune.report.evidence.efficiency_evidence import read_efficiency_evidence
from finetune.report.evidence.evidence import Evidence
from finetune.report.evidence.experiment import Experiment, load_experiment
from finetune.report.evidence.step_evidence import read_steps
from finetune.report.figures.steps_figure import draw_figure_steps
from finetune.report.labels import Labels
from finetune.report.tables.render import write_files
from finetune.report.tables.steps import build_step_tables
from finetune.report.tables.tables import build_table
from finetune.store import checks, records

ROOT = Path(__file__).parents[3]
BEFORE = ROOT / "results/paper/before"
EXPERIMENT = Experiment("paper", "printed", {}, tasks=tuple(TASKS), efficiency_models=("roberta_base",))
REAL_CHECK = checks.check_record


def variant(name, milliseconds, peak, full=40.0):
    return {
        "name": name,
        "status": "finished",
        "step_seconds": {"median": milliseconds / 1000},
        "ratio_to_full": {"mean": full / milliseconds},
        "memory": {"peak_training": peak},
    }


def record(place, *variants, before=False, rows=32, **changes):
    """Put a record below a folder; `place` is its folder and task."""
    folder, task = place.split("/")
    content = {
        "status": "finished",
        "run": {"experiment": "paper", "kind": "efficiency", "model": folder.split("-")[0], "task": task},
        "model": {"title": "A model"},
        "treatment": {"precision": "bf16", "batch_size": rows}
        | ({"graphs": "auto"} if "graphs" in folder else {})
        | ({"checkpointing": True} if "checkpointing" in folder else {}),
        "lengths": {"mean_slots": 16.0 * rows},
        "device": {"name": "a card"},
        "warnings": [],
        "variants": list(variants),
    }
    return f"{'before/' if before else ''}efficiency/{place}.json", content | changes


@pytest.fixture
def results(tmp_path):
    full, skipped = variant("full", 40.0, 2e9), {"name": "lora", "status": "skipped", "reason": "no room"}
    held = [
        record("m-sound/cola", full, variant("folded", 44.0, 1.6e9)),
        record("m-sound-graphs/cola", variant("full", 8.0, 2.2e9, 8.0), variant("folded", 11.0, 1.8e9, 8.0), skipped),
        record("m-sound/cola", full, variant("folded", 120.0, 1.7e9), before=True, note="of an earlier commit"),
        record("m-printed-graphs/mrpc", full),
        record("m/mrpc", full, warnings=["others were there"]),
        record("m-printed-folded/mrpc", variant("full", 1.0, 2e9), variant("folded_tf32", 50.0, 1.6e9)),
        record("d/rows8", variant("full", 300.0, 40e9, 300.0), rows=8),
        record("d-checkpointing/rows2", variant("lora", 200.0, 20e9), rows=2),
        record("d/rows8", full, rows=8, before=True),
        record("m/rte", status="failed"),
    ]
    for path, content in held:
        records.write_json(tmp_path / path, content)
    return tmp_path


def test_settings_hold_their_modes(results):
    found = {one.place: one for one in read_steps(results)}
    assert list(found) == ["m/mrpc", "m-sound/cola", "d/rows8", "d-checkpointing/rows2"]
    assert found["m-sound/cola"].modes() == ["eager", "graphs", "before"]
    assert found["m/mrpc"].modes() == ["eager", "graphs"]  # the protocol printed has no name among eager ones
    folded = found["m-sound/cola"].step("graphs", "folded")
    assert (folded.seconds, folded.over_full, folded.peak_over_full) == pytest.approx((0.011, 11 / 8, 1.8 / 2.2))
    mrpc = found["m/mrpc"].steps["eager"]  # choices of the folded form beside the others, with their own full
    assert {name: step.seconds for name, step in mrpc.items()} == {"full": 0.04, "folded_tf32": 0.05}
    lora = found["d-checkpointing/rows2"]
    assert lora.step("eager", "lora").peak_over_full is None and lora.checkpointing and lora.decoder
    assert lora.step("eager", "full") is None and (lora.rows, lora.tokens) == (2, 16.0)


def test_tables_are_mode_by_mode(results, tmp_path):
    steps, decoders = build_step_tables(read_steps(results), EXPERIMENT)
    row = "CoLA, bf16: SparseGrad, folded"
    values = {c.column: c.value for c in steps.cells if c.row == row}
    assert values == pytest.approx(
        {
            "now: ms": 44.0,
            "now: ms / full": 1.1,
            "now: GB": 1.6,
            "now: GB / full": 0.8,
            "now, in graphs: ms": 11.0,
            "now, in graphs: ms / full": 11 / 8,
            "now, in graphs: GB": 1.8,
            "now, in graphs: GB / full": 1.8 / 2.2,
            "before: ms": 120.0,
            "before: ms / full": 3.0,
            "before: GB": 1.7,
            "before: GB / full": 0.85,
            "eager / graphs": 4.0,
        }
    )
    assert len(steps.cell(row, "eager / graphs").records) == 2
    notes = [note.text for note in steps.notes]
    assert "Not measured, lora: no room (CoLA, bf16, now, in graphs)." in notes and "others were there." in notes
    assert "Before: of an earlier commit" in notes
    assert decoders.rows == ("8 rows, bf16: Regular FT", "2 rows, bf16, checkpointing: LoRA")
    page = write_files(tmp_path / "tables", steps)[2].read_text()
    assert f"| {row} | 44.00 | 1.10 | 1.60 | 0.80 | " in page and "of the paper" not in page
    assert "\\label{tab:paper-steps}" in (tmp_path / "tables/table_steps.tex").read_text()


def test_an_encoder_that_was_measured_eagerly_alone_has_no_further_table(tmp_path):
    path, content = record("m/cola", variant("full", 40.0, 2e9))
    records.write_json(tmp_path / path, content)
    assert build_step_tables(read_steps(tmp_path), EXPERIMENT) == []
    with pytest.raises(ValueError, match="there is no record of before"):
        draw_figure_steps(read_steps(tmp_path), tmp_path, Labels())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step_seconds": {}}, "there is no 'step_seconds.median'"),
        ({"step_seconds": {"median": 0}}, "numbers above 0"),
        ({"memory": {"peak_training": "much"}}, "numbers above 0"),
    ],
)
def test_a_damaged_step_is_refused(tmp_path, change, text):
    path, content = record("m/cola", variant("lora", 40.0, 2e9) | change)
    records.write_json(tmp_path / path, content)
    with pytest.raises(ValueError, match=text):
        read_steps(tmp_path)


def test_the_figure_shows_what_was_measured_before_with_what_is_now(results, tmp_path):
    svg, _, words = draw_figure_steps(read_steps(results), tmp_path / "figures", Labels())
    text = svg.read_text()
    assert "120 → 44 → 11" in text and "1.7 → 1.6 → 1.8" in text and "8 rows" in text
    assert "MRPC" not in text and "checkpointing" not in text  # nothing before; memory is what checkpointing is for
    held = json.loads(words.read_text())
    assert "before, now, now, in graphs" in held["caption"] and len(held["source"]) == 5


# The committed records


def test_records_of_before_are_what_was_imported():
    readme = (BEFORE / "README.md").read_text()
    paths = [path for path in sorted(BEFORE.rglob("*.json")) if path.name != "counts.json"]
    assert len(paths) == 9
    for path in paths:
        one = records.read_json(path)
        REAL_CHECK(path, one)
        assert "15c3c2b" in one["note"] and "identity" not in one  # so that no stage takes it for its own
        assert path.name in readme and path.parent.name in readme


def test_tables_3_7_and_8_are_built_where_there_is_nothing_but_records_of_speed():
    """Of the printed protocol's records as a card leaves them, here those of before."""
    experiment = load_experiment(ROOT / "experiments/paper.yaml", "paper")
    measured = read_efficiency_evidence(experiment, BEFORE)
    three, seven, eight = (build_table(number, Evidence(experiment), measured) for number in (3, 7, 8))
    folded = three.cell("SparseGrad, folded / Regular FT", "Steps/Sec.")
    assert folded.value == pytest.approx(0.4059, abs=1e-4) and "partial_average" in {r.kind for r in folded.reasons}
    score = three.cell("SparseGrad, folded", "Score")
    assert (score.verdict, score.reasons[0].kind) == ("not run", "no_run")
    assert seven.cell("LoRA", "CoLA").value == pytest.approx(17.247, abs=1e-3)
    assert seven.cell("LoRA", "RTE").reasons[0].kind == "no_record"
    assert eight.cell("SparseGrad, truncated (inputs), peak in training", "CoLA").value == pytest.approx(
        2966.09, abs=0.01
    )
    assert not measured.left_out
