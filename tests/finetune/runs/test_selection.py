"""One half of the validation rows selects, the other reports: in a run, in a search, in what a record is held to."""

import json

import numpy as np
import pytest

from finetune.store import records
from finetune.store.arrays import unpack_array
from finetune.store.checks import check_record, checksum
from finetune.training.metrics import compute

HALF = "scale.selection=half"


@pytest.mark.parametrize(("task", "metric"), [("cola", "matthews_correlation"), ("mrpc", "accuracy")])
def test_the_score_is_the_reporting_halfs_where_the_selecting_half_is_best(task, metric, once):
    record = once("method=full", HALF, "scale.max_steps=12", "learning_rate=0.005", task=task)
    evaluations = {entry["step"]: entry for entry in record["evaluations"]}
    at_best = evaluations[record["training"]["best_step"]]
    assert at_best[metric] == max(entry[metric] for entry in evaluations.values())
    assert record["score"] == at_best[f"report_{metric}"]
    kept = record["predictions"]
    report, labels, found = (unpack_array(kept[name]) for name in ("report", "labels", "best"))
    assert report.sum() == kept["rows"] // 2
    for prefix, rows in (("", ~report), ("report_", report)):
        assert compute(metric, found[rows], labels[rows]) == pytest.approx(at_best[prefix + metric], abs=1e-12)
    assert record["identity"]["selection"] == record["data"]["selection"] == "half"


def test_halves_are_a_choice_of_their_own_and_all_rows_leave_the_identity_as_it_was(once):
    whole, half = once("method=full"), once("method=full", HALF)
    assert "selection" not in whole["identity"] and whole["predictions"]["report"] is None
    assert whole["run"]["config_hash"] != half["run"]["config_hash"]
    assert whole["predictions"]["last"] == half["predictions"]["last"]  # nothing of the training changes


def test_predictions_are_kept_over_a_kill(once, numbers, killed):
    whole = once("method=full", HALF)
    killed(2, lambda: once("method=full", HALF, "scale.checkpoint_seconds=0"))
    assert numbers(once("method=full", HALF, "scale.checkpoint_seconds=0"))["predictions"] == whole["predictions"]


def test_a_record_whose_score_is_another_halfs_is_refused(once, tmp_path):
    path = tmp_path / "tiny_bert" / "full" / "record.json"
    record = once("method=full", HALF, "scale.max_steps=12", "learning_rate=0.005", task="mrpc", path=path)
    named = path.with_name(f"mrpc-seed1-{record['run']['config_hash']}.json")
    path.rename(named)
    record = records.read_json(named)
    check_record(named, record)
    step = record["training"]["best_step"]
    at_best = next(entry for entry in record["evaluations"] if entry["step"] == step)
    record["score"] = at_best["report_accuracy"] + 0.01
    record["checksum"] = checksum(record)
    with pytest.raises(ValueError, match="has score"):
        check_record(named, json.loads(json.dumps(record)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_logits_in_chunks_change_a_run_of_dialogues_by_rounding_alone(method, precision, once):
    change = (f"method={method}", HALF, f"scale.precision={precision}", f"scale.frozen_dtype={precision}")
    whole = once(*change, task="oasst1")
    chunks = once(*change, "scale.logits_chunk=40", task="oasst1")
    assert chunks["identity"] == whole["identity"]
    tolerance = 1e-5 if precision == "fp32" else 3e-3
    for one, other in zip(whole["evaluations"], chunks["evaluations"], strict=True):
        assert other == pytest.approx(one, rel=tolerance)
    losses, again = (unpack_array(record["predictions"]["best"]) for record in (whole, chunks))
    assert np.allclose(losses, again, rtol=10 * tolerance) and len(losses) == whole["data"]["rows"]["validation"]
