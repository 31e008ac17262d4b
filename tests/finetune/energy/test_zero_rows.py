"""Zero rows of output gradients: all of the padding's, and in text those that no later token reads."""

import json

import pytest
import torch

from finetune import models
from finetune.energy.zero_rows import count_zero_rows, zero_rows_of_tasks
from finetune.methods import Targets

CPU = torch.device("cpu")
BATCHES = [[0, 1, 2, 3], [4, 5, 6]]


@pytest.fixture
def counted(classifier, load, config):
    def make(padding):
        targets = Targets(config()["model"]["target_modules"])
        return count_zero_rows(
            classifier(dropout=False), load("cola", padding=padding)[1]["train"], targets, BATCHES, CPU
        )

    return make


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_padding_is_zero_in_every_layer_and_text_in_the_last_but_for_the_first_token(padding, counted, load):
    split = load("cola", padding=padding)[1]["train"]
    lengths = [len(split.input_ids[row]) for rows in BATCHES for row in rows]
    found = counted(padding)
    assert found["tokens"] - found["padding_tokens"] == sum(lengths)
    if padding == "max_length":
        assert found["tokens"] == 32 * 7
    assert len(found["layers"]) == 4
    for layer in found["layers"]:
        last = layer["layer"] == 1
        # The pooler reads the first token alone, so the last block's other tokens have no gradient.
        assert layer["zero_rows"] == {"padding": found["padding_tokens"], "text": sum(lengths) - 7 if last else 0}
    text = (sum(lengths) - 7) / sum(lengths) / 2
    assert found["shares"]["padding"] == 1.0 and found["shares"]["text"] == pytest.approx(text)


def test_the_count_is_of_the_gradients_by_hand(classifier, load, config):
    model, split = classifier(dropout=False), load("cola")[1]["train"]
    batch = split.batch(BATCHES[0])
    labels = batch.pop("labels")
    seen = {}
    layer = model.bert.encoder.layer[1].output.dense
    layer.register_forward_hook(lambda m, i, o: (o.retain_grad(), seen.setdefault("y", o))[1])
    torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
    zero = (seen["y"].grad.flatten(0, 1).abs().sum(1) == 0).sum()
    found = count_zero_rows(
        classifier(dropout=False), split, Targets(config()["model"]["target_modules"]), BATCHES[:1], CPU
    )
    [ours] = [one["zero_rows"] for one in found["layers"] if (one["kind"], one["layer"]) == ("down", 1)]
    assert sum(ours.values()) == int(zero) > 0


def test_no_batch_is_refused(classifier, load, config):
    with pytest.raises(ValueError, match="no batch"):
        count_zero_rows(classifier(), load("cola")[1]["train"], Targets(config()["model"]["target_modules"]), [], CPU)


def test_a_file_for_all_tasks_and_both_paddings(config, tmp_path):
    found = config("protocol.max_length=32") | {"seed": 0, "batches": 2, "batch_size": 4}
    lines = zero_rows_of_tasks(found, ["cola", "stsb"], tmp_path / "zero.json")
    content = json.loads((tmp_path / "zero.json").read_text())
    assert len(lines) == 4 and set(content["tasks"]) == {"cola", "stsb"}
    for task in content["tasks"].values():
        assert task["max_length"]["padding_tokens"] > task["longest"]["padding_tokens"]
        assert task["max_length"]["shares"]["text"] == pytest.approx(task["longest"]["shares"]["text"])


def test_padding_goes_no_further_than_the_model_has_positions(config, tmp_path):
    found = config("protocol.max_length=4096") | {"batches": 1, "batch_size": 4, "seed": 0}
    zero_rows_of_tasks(found, ["cola"], tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    positions = models.positions(models.load_classifier(found["model"], found["data"]["root"], 2, 0))
    assert written["max_length"] == positions < 4096
    assert written["tasks"]["cola"]["max_length"]["tokens"] == 4 * positions
