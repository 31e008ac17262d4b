"""Models and tokenizers: where they are looked for, what decides their weights, what a broken folder says."""

import shutil

import pytest
import torch

from finetune import models


@pytest.fixture
def group(compose, tiny_checkpoint):
    """``group(**changes)``: the model group of the tiny checkpoint."""
    return lambda **changes: compose("model=tiny_bert", f"model.checkpoint={tiny_checkpoint}")["model"] | changes


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_a_folder_comes_before_the_hub_and_a_given_one_first(group, tiny_checkpoint, tmp_path):
    named = group(checkpoint="acme/tiny", revision="abc")
    assert models.resolve(named, tmp_path) == ("acme/tiny", {"revision": "abc"})
    assert models.fingerprint(named, tmp_path) == "acme/tiny@abc"
    local = tmp_path / "models" / "tiny_bert"
    local.mkdir(parents=True)
    assert models.resolve(named, tmp_path) == (str(local), {"local_files_only": True})
    assert models.resolve(group(), tmp_path) == (str(tiny_checkpoint), {"local_files_only": True})


def test_model_of_a_stage_that_did_not_run(group, tmp_path):
    with pytest.raises(ValueError, match=r"models/tiny_bert does not exist; the pretrain stage writes it"):
        models.resolve(group(checkpoint=None), tmp_path)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no", "../no"])
def test_path_that_is_no_folder_is_not_taken_for_a_hub_name(path, group, tmp_path):
    with pytest.raises(ValueError, match=rf"model.checkpoint='{path}' is no folder; give a folder with config.json"):
        models.resolve(group(checkpoint=path), tmp_path)


def test_body_is_loaded_and_head_drawn_from_the_seed(group, tiny_checkpoint):
    from safetensors.torch import load_file

    a, same, other = (models.load_classifier(group(), "", 2, seed) for seed in (1, 1, 2))
    stored = load_file(tiny_checkpoint / "model.safetensors")
    body = a.bert.state_dict()
    assert all(torch.equal(body[name.removeprefix("bert.")], tensor) for name, tensor in stored.items())
    assert torch.equal(a.classifier.weight, same.classifier.weight)
    assert not torch.equal(a.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_number_of_labels(labels, group):
    model = models.load_classifier(group(), "", labels, 0)
    assert model.classifier.weight.shape == (labels, 32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_random_weights_follow_architecture_and_seed(group):
    random = group(random_weights=True, architecture={"model_type": "bert", "vocab_size": 50, "hidden_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24})  # fmt: skip
    a, same, other = (models.load_classifier(random, "", 2, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], same[name]) for name in a)
    assert any(not torch.equal(a[name], other[name]) for name in a)
    assert a["bert.encoder.layer.0.intermediate.dense.weight"].shape == (24, 16)
    assert models.fingerprint(random, "") == "random"


def test_loading_says_nothing_and_leaves_transformers_logging_as_it_was(group, capfd, caplog):
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    models.load_classifier(group(), "", 2, 0)
    models.load_tokenizer(group(), "")
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("damage", ["no config", "no weights", "broken config", "broken weights", "short weights"])
def test_broken_checkpoint_folder(damage, group, copy):
    config, weights = copy / "config.json", copy / "model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "broken config":
        config.write_text('{"model_type": "be')
    elif damage == "broken weights":
        weights.write_bytes(b"<html>not found</html>")
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"no model at {copy}: .+ Set data.root \(or SPARSEGRAD_DATA\)"):
        models.load_classifier(group(checkpoint=str(copy)), "", 2, 0)


def test_hub_name_offline_says_what_to_set(group, tmp_path):
    with pytest.raises(ValueError, match=r"no model at acme/tiny: .* or model.checkpoint to a folder"):
        models.load_classifier(group(checkpoint="acme/tiny", revision=None), tmp_path, 2, 0)
    with pytest.raises(ValueError, match="no tokenizer at acme/tiny: "):
        models.load_tokenizer(group(checkpoint="acme/tiny", revision=None), tmp_path)


def test_a_folder_without_a_tokenizer_may_name_another(group, copy, tiny_checkpoint):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match=f"no tokenizer at {copy}: "):
        models.load_tokenizer(group(checkpoint=str(copy)), "")
    tokenizer = models.load_tokenizer(group(checkpoint=str(copy), tokenizer=str(tiny_checkpoint)), "")
    assert tokenizer.tokenize("The cat sees") == ["the", "cat", "sees"]


@pytest.mark.parametrize(("name", "expected"), [("bert_base", 512), ("roberta_base", 512), ("tiny_roberta", 64)])
def test_positions_are_the_longest_input(name, expected, compose):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    architecture = compose(f"model={name}")["model"]["architecture"] | sizes | {"intermediate_size": 24}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**architecture)).eval()
    assert models.positions(model) == expected
    model(input_ids=torch.full((1, expected), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, expected + 1), 5))


def test_fingerprint_is_of_the_weights_alone(group, copy):
    before = models.fingerprint(group(), "")
    assert len(before) == 64 and models.fingerprint(group(checkpoint=str(copy)), "") == before
    (copy / "vocab.txt").write_text("other\n")
    assert models.fingerprint(group(checkpoint=str(copy)), "") == before
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert models.fingerprint(group(checkpoint=str(copy)), "") != before
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no \*.safetensors file; weights in other formats are not read\."):
        models.fingerprint(group(checkpoint=str(copy)), "")
