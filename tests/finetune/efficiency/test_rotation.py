"""Precision of the rotation: its inputs travel whole, float32 agrees with float64, all precisions meet the same."""

import json
import shutil

import pytest
import torch

from finetune import models
from finetune.data.glue import load_task
from finetune.efficiency.rotation import RotationOptions, main, measure_rotation
from finetune.efficiency.rotation_inputs import prepare, read_examples, read_model
from finetune.efficiency.rotation_table import GRADIENT, HEAD, table_rows
from finetune.efficiency.rotation_trial import agreement, draw
from finetune.efficiency.stage import Stage
from finetune.report.tables.targets import fill

STEPS = 4


@pytest.fixture(scope="module")
def groups(compose, tiny_checkpoint):
    config = compose("model=tiny_bert", f"model.checkpoint={tiny_checkpoint}")
    return config["model"], config["data"]


@pytest.fixture(scope="module")
def folder(groups, glue_root, tmp_path_factory):
    """CoLA and STS-B, prepared. Read only."""
    folder = tmp_path_factory.mktemp("rotation")
    prepare(*groups, glue_root, ["cola", "stsb"], folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """A record of both tasks on the CPU, its path and its stage's folder for finished parts."""
    place = tmp_path_factory.mktemp("record")
    stage = Stage(place / "rotation.json", checkpoints=place / "kept")
    options = RotationOptions(steps=STEPS, batch_size=8, density=0.05, gradients=2, seeds=(3,), device="cpu", threads=1)
    examples = [folder / f"{name}.safetensors" for name in ("cola", "stsb")]
    return (
        measure_rotation(folder, examples, options, stage),
        stage,
        lambda: measure_rotation(folder, examples, options, stage),
    )


def test_prepared_rows_are_the_tasks_and_give_the_checkpoints_logits(groups, folder, glue_root, tokenizer):
    model, data = groups
    for name in ("cola", "stsb"):
        given = {"max_length": 128, "padding": "longest"}
        expected = load_task(data | {"root": str(glue_root), "task": name}, tokenizer, **given)
        task, splits = read_examples(folder / f"{name}.safetensors")
        assert task == expected[0]
        plain = models.load_classifier(model, "", task.num_labels, seed=5).eval()
        plain.base_model.half().float()
        small = models.load_classifier(read_model(folder), "", task.num_labels, seed=5).eval()
        for role in ("train", "validation"):
            ours, theirs = splits[role].batch(range(20)), expected[1][role].batch(range(20))
            assert ours.keys() == theirs.keys() and len(splits[role]) == len(expected[1][role])
            assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "input_ids")
            assert torch.equal(small(**ours).logits, plain(**theirs).logits)
    assert small.config.vocab_size <= plain.config.vocab_size


def test_batches_are_permutations_end_to_end():
    rows = [row for batch in draw(10, 6, 5, seed=0) for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10)) and rows[:10] != rows[10:20]


def test_agreement_of_known_selections():
    exact = torch.tensor([[3.0, -4.0], [1.0, 2.0]], dtype=torch.float64)
    assert agreement(exact, torch.tensor([0, 1])) == (1.0, 1.0)
    assert agreement(exact, torch.tensor([1, 3])) == (0.5, 20 / 25)


def test_a_record_compares_all_precisions_on_the_same_gradients(measured):
    record, *_ = measured
    assert record["run"]["kind"] == "rotation" and record["treatment"]["looks"] == [0, 1, 2, 4]
    assert set(record["treatment"]["left_out"]) == {"tf32"}
    assert [(e["task"], e["precision"], e["seed"]) for e in record["entries"]] == [
        ("cola", "bf16", 3),
        ("stsb", "bf16", 3),
    ]
    for entry in record["entries"]:
        exact, rounded = (entry["rotations"][name] for name in ("float32", "bf16"))
        assert exact["losses"][0] == rounded["losses"][0] and len(exact["losses"]) == STEPS == len(rounded["losses"])
        assert exact["loss"] == pytest.approx(sum(exact["losses"]) / STEPS)
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=1e-2) and entry["metric"] in exact["validation"]
        assert all(0 < one["optimizer_ms"] < one["step_ms"] for one in (exact, rounded))
        assert [look["step"] for look in entry["looks"]] == [0, 1, 2, 4]
        for kind in (kind for look in entry["looks"] for kind in look["kinds"].values()):
            assert kind["float32"] == {"agree": 1.0, "least": 1.0, "energy": 1.0}
            for name in ("bf16", GRADIENT):
                assert 0.8 < kind[name]["least"] <= kind[name]["agree"] <= 1 and 0.99 < kind[name]["energy"] <= 1


def test_a_finished_record_is_reused_and_a_killed_one_taken_up(measured, monkeypatch):
    record, stage, again = measured
    monkeypatch.setattr("finetune.efficiency.rotation.repetition", None)
    assert again() == record
    kept = stage.checkpoints / record["run"]["config_hash"]
    kept.mkdir(parents=True)
    for entry in record["entries"]:
        (kept / f"{entry['task']}-bf16-3.json").write_text(json.dumps(entry))
    stage.path.unlink()
    assert again()["entries"] == record["entries"] and not kept.exists()


def test_the_table_has_a_row_for_each_rotation_and_the_gradient(measured):
    rows = table_rows(measured[0])
    assert len(rows) == 2 * 3 and {len(row) for row in rows} == {len(HEAD)}
    assert rows[0][:4] == ["cola, bf16", "float32", "100.00 %", "100.0000 %"]
    losses = [measured[0]["entries"][0]["rotations"][name]["loss"] for name in ("float32", "bf16")]
    assert rows[0][4] == f"{losses[0]:.4f}" and rows[1][4].startswith(f"{losses[1] - losses[0]:+.4f} (")
    page = fill("<!-- targets -->\n<!-- rotation -->\n| stale |\n", measured[1].path.parent)
    assert page.endswith(f"| {' | '.join(rows[-1])} |\n") and "stale" not in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps=0; it must be at least 1"),
        ({"precisions": ["fp16"]}, r"precisions=\['fp16'\]; one or more, each once, of: fp32, bf16"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
        ({"rotations": ["bf16"]}, "float32 must be there"),
        ({"rotations": ["float32", "float16"]}, "of: float32, tf32, bf16"),
    ],
)
def test_options_out_of_range_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        RotationOptions(**change)


def test_what_cannot_be_measured_is_refused_in_one_line(folder, tmp_path):
    def told(*arguments, model=folder):
        with pytest.raises(SystemExit) as stopped:
            main(["--model", str(model), "--output", str(tmp_path / "r.json"), "--device", "cpu", *map(str, arguments)])
        return stopped.value.code

    cola = folder / "cola.safetensors"
    assert "TF32 exists on CUDA alone" in told("--examples", cola, "--rotations", "float32", "tf32")
    assert "one file a task" in told("--examples", cola, cola)
    assert "does not exist" in told("--examples", cola, model=tmp_path)
    assert "of another program" in told("--examples", folder / "model.safetensors")
    shutil.copy(cola, tmp_path / "cut.safetensors")
    with (tmp_path / "cut.safetensors").open("r+b") as file:
        file.truncate(2000)
    assert "is damaged" in told("--examples", tmp_path / "cut.safetensors")
