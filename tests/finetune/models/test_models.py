"""Models and tokenizers: where they are looked for, what decides their weights, what a broken folder says."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import models
from finetune.models.merged import MERGED, read_merged, save_merged


@pytest.fixture
def group(compose, tiny_checkpoint):
    """``group(**changes)``: the model group of the tiny checkpoint."""
    return lambda **changes: compose("model=tiny_bert", f"model.checkpoint={tiny_checkpoint}")["model"] | changes


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_a_folder_comes_before_the_hub_and_a_given_one_first(group, tiny_checkpoint, tmp_path):
    commit = "abc0" * 10
    named = group(checkpoint="acme/tiny", revision=commit)
    assert models.resolve(named, tmp_path) == ("acme/tiny", {"revision": commit})
    assert models.fingerprint(named, tmp_path) == f"acme/tiny@{commit}"
    local = tmp_path / "models" / "tiny_bert"
    local.mkdir(parents=True)
    assert models.resolve(named, tmp_path) == (str(local), {"local_files_only": True})
    assert models.resolve(group(), tmp_path) == (str(tiny_checkpoint), {"local_files_only": True})


def test_model_of_a_stage_that_did_not_run(group, tmp_path):
    with pytest.raises(ValueError, match=r"models/tiny_bert does not exist; the pretrain stage writes it"):
        models.resolve(group(checkpoint=None), tmp_path)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no", "../no", "~/no", "models/no/such", "no such", ""])
@pytest.mark.parametrize("local", [False, True])
def test_path_that_is_no_folder_is_not_taken_for_a_hub_name(path, local, group, tmp_path):
    """Nor is the folder under data.root taken in its place."""
    if local:
        (tmp_path / "models" / "tiny_bert").mkdir(parents=True)
    for option in ("checkpoint", "tokenizer")[: 1 + bool(path)]:
        with pytest.raises(ValueError, match=rf"model.{option}='{path}' is no folder and no hub name; give a folder"):
            models.load_tokenizer(group(**{option: path}), tmp_path)


def test_a_hub_name_needs_a_commit(group, tmp_path):
    (tmp_path / "models" / "tiny_bert").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"model.checkpoint='models/typo' is no folder, and a hub name needs"):
        models.resolve(group(checkpoint="models/typo"), tmp_path)


def test_a_folder_that_was_fetched_from_another_source_is_not_taken(group, tmp_path):
    local = tmp_path / "models" / "tiny_bert"
    local.mkdir(parents=True)
    (local / "SHA256SUMS").write_text("# acme/tiny@abc\n")
    assert models.resolve(group(checkpoint="acme/tiny", revision="abc"), tmp_path)[0] == str(local)
    for given in ({"checkpoint": "acme/other", "revision": "abc"}, {"checkpoint": "acme/tiny", "revision": "abd"}):
        wanted = f"{given['checkpoint']}@{given['revision']}"
        with pytest.raises(ValueError, match=rf"tiny_bert holds acme/tiny@abc, not {wanted}: set model.checkpoint="):
            models.resolve(group(**given), tmp_path)


def test_body_is_loaded_and_head_drawn_from_the_seed(group, tiny_checkpoint):
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
    said = {
        "no config": rf"no model at {copy}: .+ Set data.root \(or SPARSEGRAD_DATA\)",
        "no weights": rf"{copy} has no \*.safetensors file; weights in other formats are not read",
        "broken config": rf"{config} is no JSON \(.+\): fetch it again",
    }
    with pytest.raises(
        ValueError, match=said.get(damage, rf"{weights} is damaged, or no safetensors file \(.+\): fetch")
    ):
        models.load_classifier(group(checkpoint=str(copy)), "", 2, 0)


def change(names, tensors):
    """The tensors under other names, in other sizes, or without some."""
    return {
        "all": {f"x{name}": tensor for name, tensor in tensors.items()},
        "half": {(name if place % 2 else f"x{name}"): t for place, (name, t) in enumerate(tensors.items())},
        "prefix": {f"model.bert.{name}": tensor for name, tensor in tensors.items()},
        "block": {name: tensor for name, tensor in tensors.items() if "layer.1." not in name},
        "one": {name: t for name, t in tensors.items() if name != "encoder.layer.0.output.dense.bias"},
        "size": tensors | {"encoder.layer.0.output.dense.weight": torch.zeros(32, 65)},
        "block more": tensors | {"encoder.layer.2.output.dense.weight": torch.zeros(32, 64)},
        "half a pooler": {name: tensor for name, tensor in tensors.items() if name != "pooler.dense.bias"},
        "a pooler under a head": {n: t for n, t in tensors.items() if not n.startswith("pooler")}
        | {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)},
        "half a head": tensors | {"classifier.weight": torch.zeros(2, 32)},
        "head of another size": tensors | {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)},
    }[names]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("all", r"37 missing \(bert.embeddings.LayerNorm.bias, .+, .+, \.\.\.\)"),
        ("half", "20 missing"),
        ("prefix", "37 missing"),
        ("block", r"16 missing \(bert.encoder.layer.1.attention.output.LayerNorm.bias, "),
        ("one", r"1 missing \(bert.encoder.layer.0.output.dense.bias\)"),
        ("size", r"1 of another size \(bert.encoder.layer.0.output.dense.weight\)"),
        ("block more", r"1 of no layer \(encoder.layer.2.output.dense.weight\)"),
        ("half a pooler", r"1 missing \(bert.pooler.dense.bias\)"),
        ("a pooler under a head", r"2 missing \(bert.pooler.dense.bias, bert.pooler.dense.weight\)"),
        ("half a head", r"1 missing \(classifier.bias\)"),
        ("head of another size", r"2 of another size \(classifier.bias, classifier.weight\)"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_with_their_names(names, told, group, copy):
    file = copy / "model.safetensors"
    save_file(change(names, load_file(file)), file, {"format": "pt"})
    text = rf"{copy}: its weights are not those of a BertForSequenceClassification with its config.json: .*{told}"
    with pytest.raises(ValueError, match=text):
        models.load_classifier(group(checkpoint=str(copy)), "", 2, 0)


@pytest.mark.parametrize("kept", ["head", "no pooler"])
def test_a_head_that_is_there_is_kept_and_a_pooler_may_be_new_with_it(kept, group, copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    if kept == "head":
        tensors |= {"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.ones(2)}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(tensors, file, {"format": "pt"})
    model = models.load_classifier(group(checkpoint=str(copy)), "", 2, 0)
    assert torch.equal(model.classifier.weight, torch.ones(2, 32)) == (kept == "head")


@pytest.mark.parametrize(("names", "told"), [("norm", "1 missing"), ("block more", "1 of no la"), ("size", "1 of an")])
def test_decoders_have_no_new_head(names, told, group, chat_root, tmp_path):
    folder = shutil.copytree(chat_root / "models" / "tiny", tmp_path / "copy")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = {
        "norm": {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"},
        "block more": tensors | {"model.layers.9.mlp.up_proj.weight": torch.zeros(48, 32)},
        "size": tensors | {"lm_head.weight": torch.zeros(7, 32)},
    }[names]
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"its weights are not those of a LlamaForCausalLM .*: {told}"):
        models.load_causal(group(checkpoint=str(folder)), "", 0)


@pytest.fixture
def sharded(copy):
    """The checkpoint in three shards, with an index."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    files = {name: f"model-{place % 3 + 1:05}-of-00003.safetensors" for place, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, copy / file, {"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return copy


def test_all_shards_are_read(sharded, group, tiny_checkpoint):
    one, three = (models.load_classifier(group(checkpoint=str(at)), "", 2, 0) for at in (tiny_checkpoint, sharded))
    assert all(torch.equal(tensor, three.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda at: (at / "model-00002-of-00003.safetensors").unlink(), r"lacks model-00002-of-00003.safetensors; it"),
        (lambda at: (at / "model.safetensors.index.json").unlink(), r"lacks model.safetensors; it has model-00001"),
        (lambda at: (at / "model.safetensors.index.json").write_text("{}"), r"index.json has no weight_map"),
        (lambda at: (at / "model.safetensors.index.json").write_text("{"), r"index.json is no JSON \(.+\): fetch"),
        (lambda at: save_file({}, at / "model.safetensors"), r"model.safetensors beside model-00001-of-00003.saf"),
        (lambda at: save_file({}, at / "model-00001-of-00002.safetensors"), r"model-00001-of-00002.safetensors beside"),
        (lambda at: save_file({}, at / "model-00001-of-00003 (1).safetensors"), r"downloaded twice; keep one"),
    ],
)
def test_shards_that_are_there_in_part_or_twice_are_refused(damage, told, sharded, group):
    damage(sharded)
    for read in (models.fingerprint, lambda *given: models.load_classifier(*given, 2, 0)):
        with pytest.raises(ValueError, match=told):
            read(group(checkpoint=str(sharded)), "")


def test_pickles_and_code_beside_a_checkpoint_are_not_run(group, copy, monkeypatch):
    """Nor is anybody asked at the terminal whether they should be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").rename(copy / "away")
    with pytest.raises(ValueError, match=r"has no \*.safetensors file; weights in other formats are not read\."):
        models.load_classifier(group(checkpoint=str(copy)), "", 2, 0)
    (copy / "away").rename(copy / "model.safetensors")
    (copy / "evil.py").write_text("raise SystemExit('run')\n")
    (copy / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    with pytest.raises(ValueError, match="no model at .* contains custom code"):
        models.load_classifier(group(checkpoint=str(copy)), "", 2, 0)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer.json", "{", r"tokenizer.json is no JSON \(.+\): fetch it again"),
        ("tokenizer.json", "[]", r"tokenizer.json holds a list, not a JSON object: fetch it again"),
        ("tokenizer.json", "{}", r"no tokenizer at .+: KeyError: 'added_tokens' Set data.root"),
        ("tokenizer_config.json", "null", "tokenizer_config.json holds a NoneType, not a JSON object"),
        ("config.json", '{"model_type": "bert", "hidden_size": "x"}', "no tokenizer at .+Error: Validation error"),
    ],
)
def test_broken_tokenizer_files(name, content, told, group, copy):
    (copy / name).write_text(content)
    with pytest.raises(ValueError, match=told):
        models.load_tokenizer(group(checkpoint=str(copy)), "")


def test_a_models_file_may_bring_a_chat_template_along(group, chat_root):
    at = group(checkpoint=str(chat_root / "models" / "tiny"))
    assert models.load_tokenizer(at | {"chat_template": "{{ messages[0].content }}"}, "").chat_template.startswith("{{")
    assert models.load_tokenizer(at, "").chat_template is None


def test_a_decoder_judges_the_last_token_that_is_no_padding(group, chat_root):
    at = group(checkpoint=str(chat_root / "models" / "tiny"))
    model = models.load_classifier(at, "", 2, 0, pad_token_id=2).eval()
    assert model.config.pad_token_id == 2 and models.load_classifier(at, "", 2, 0).config.pad_token_id is None
    short, long = (model(input_ids=torch.tensor([[5, 6, *fill]])).logits for fill in ([], [2, 2, 2]))
    torch.testing.assert_close(short, long)


def test_hub_name_offline_says_what_to_set(group, tmp_path):
    with pytest.raises(ValueError, match=r"no model at acme/tiny: .* or model.checkpoint to a folder"):
        models.load_classifier(group(checkpoint="acme/tiny", revision="a" * 40), tmp_path, 2, 0)
    with pytest.raises(ValueError, match="no tokenizer at acme/tiny: "):
        models.load_tokenizer(group(checkpoint="acme/tiny", revision="a" * 40), tmp_path)


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


def test_a_merged_model_is_read_as_it_was_written(copy, group, tmp_path):
    at = group(checkpoint=str(copy))
    folder = tmp_path / "seed1"
    save_merged(models.load_classifier(at, "", 2, 0), models.load_tokenizer(at, ""), folder, {"config_hash": "abc"})
    facts = read_merged(folder)
    assert facts["config_hash"] == "abc" and set(facts["files"]) == {path.name for path in folder.iterdir()} - {MERGED}
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"seed1/model.safetensors is missing, or another than was written: train the"):
        read_merged(folder)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"seed1/config.json is missing, or another than was written: train the model"):
        read_merged(folder)
    (folder / MERGED).write_text("{}")
    with pytest.raises(ValueError, match=r"training.json names no files: train the model again"):
        read_merged(folder)
