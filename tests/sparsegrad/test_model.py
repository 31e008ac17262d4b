"""PEFT's words: what trains, what comes back to the bit, what files hold, what is refused; beside peft's LoRA model."""

import copy
import inspect
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from literal import assert_unchanged, snapshot
from torch import nn

import sparsegrad
from sparsegrad import (
    SparseGradAdamW,
    SparseGradConfig,
    SparseGradModel,
    find_targets,
    get_sparsegrad_model,
    load_bases,
    load_tensors,
    merge,
    param_groups,
    refresh,
    save_bases,
    sparsegrad_layers,
    sparsify,
)

FORMS = {
    "folded": {},
    "rotated": {"form": "rotated", "select_in": "backward"},
    "truncated": {"form": "truncated"},
    "side": {"form": "truncated", "update": "side", "keep": 4},
}
K = {"up": 7, "down": 9}


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def steps(model, tokens, n=2, optimizer=None):
    optimizer = optimizer or SparseGradAdamW(param_groups(model), lr=1e-2)
    for _ in range(n):
        optimizer.zero_grad()
        torch.log_softmax(model(input_ids=tokens).logits.float(), -1)[..., 0].square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.fixture
def make(tiny_transformer, transformer_bases):
    """``make(family, form, **config)``: a model with an adapter, a base model of its own, and an input."""

    def made(family="bert", form="folded", bases=True, dtype=torch.float64, prepare=lambda model: None, **config):
        model, patterns, tokens = tiny_transformer(family, dtype=dtype)
        prepare(model)
        base, _, _ = tiny_transformer(family, dtype=dtype)
        own = {"k": K, "target_modules": patterns} | FORMS[form] | config
        return (
            get_sparsegrad_model(model, SparseGradConfig(**own), transformer_bases() if bases else None),
            base,
            tokens,
        )

    return made


HEAD = {"bert": "classifier", "llama": "lm_head"}
EACH = pytest.mark.parametrize("family", ["bert", "llama"])
EVERY = pytest.mark.parametrize("form", FORMS)


# ---- what trains ----


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@EACH
@EVERY
@pytest.mark.parametrize("before", [True, False])
def test_freezing_before_or_after_makes_no_difference_to_what_trains(family, form, before, make):
    head = HEAD[family]
    model, base, tokens = make(
        family, form, modules_to_save=[head], prepare=(lambda m: m.requires_grad_(False)) if before else lambda m: None
    )
    if not before:
        model.requires_grad_(False)
        next(model.parameters()).requires_grad_(True)  # some embedding, which the configuration does not name
    steps(model, tokens)
    core = "core" if form in ("truncated", "side") else "weight"
    expected = {f"base_model.{name}.{core}" for name in sparsegrad_layers(model.get_base_model())}
    assert trained(model) == expected | {n for n, _ in model.named_parameters() if f".{head}." in n} != expected
    plain = merge(model.get_base_model()).state_dict()
    moved = {name for name, t in base.state_dict().items() if not torch.equal(t, plain[name])}
    assert moved == {n for n in plain if f"{head}." in n or (".dense.weight" in n and "attention" not in n)} - {
        "bert.pooler.dense.weight"
    } | {n for n in plain if re.search(r"(up|down)_proj", n)}


@EVERY
def test_steps_are_those_of_a_sparsified_model_with_the_rest_frozen(form, make, tiny_transformer, transformer_bases):
    model, _, tokens = make(form=form)
    steps(model, tokens, 3)
    other, patterns, _ = tiny_transformer("bert")
    sparsify(other, transformer_bases(), K, patterns, **FORMS[form])
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(any(parameter is m.trained for m in sparsegrad_layers(other).values()) or not name)
    steps(other, tokens, 3)
    assert torch.equal(logits(model, tokens), logits(other, tokens))


def test_the_numbers_are_what_a_step_moves_and_where_they_lie(make, capsys):
    model, base, _ = make(modules_to_save=["classifier"])
    head, matrices = sum(p.numel() for p in base.classifier.parameters()), 4 * 16 * 24
    every = sum(p.numel() for p in base.parameters())
    assert model.get_nb_trainable_parameters() == (2 * (7 + 9) + head, every)
    model.print_trainable_parameters()
    out = capsys.readouterr().out
    assert out.startswith(f"trainable params: {32 + head} || all params: {every:,d} || trainable%: ")
    assert f"{matrices + head:,d} parameters" in out
    model, base, _ = make(form="side")
    assert model.get_nb_trainable_parameters() == (4 * 4, every + 2 * (2 * 2 + 3 * 3))  # keep, and the cores


def test_the_head_of_a_task_trains_as_in_peft(make, tiny_transformer):
    peft = pytest.importorskip("peft")
    model, base, _ = make(task_type="SEQ_CLS")
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["intermediate.dense"]))
    heads = {
        re.sub(r"^base_model\.model\.|modules_to_save\.default\.", "", n) for n in trained(theirs) if "lora" not in n
    }
    assert heads == {n.removeprefix("base_model.") for n in trained(model) if "layer" not in n}
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    assert make("llama", task_type="CAUSAL_LM")[0].peft_config["default"].modules_to_save is None


# ---- with and without the adapter ----


@EACH
@EVERY
def test_the_base_comes_back_to_the_bit_and_the_adapter_too(family, form, make):
    model, base, tokens = make(family, form, modules_to_save=[HEAD[family]])
    plain = logits(base, tokens)
    torch.testing.assert_close(logits(model, tokens), plain, rtol=0, atol=1e-12)
    optimizer = steps(model, tokens)
    now, layers = logits(model, tokens), sparsegrad_layers(model)
    assert (now - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
        assert not sparsegrad_layers(model) and not trained(model)
    assert torch.equal(logits(model, tokens), now) and sparsegrad_layers(model) == layers
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), now, rtol=0, atol=1e-12)
    assert not sparsegrad_layers(model) and list(model.get_base_model().state_dict()) == list(base.state_dict())
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
    torch.testing.assert_close(logits(model, tokens), now, rtol=0, atol=1e-12)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), now) and sparsegrad_layers(model) == layers
    steps(model, tokens, 1, optimizer)  # the same weights: its optimizer goes on
    assert not torch.equal(logits(model, tokens), now)
    wrapped, model = model, model.unload()
    assert type(model) is type(base)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert torch.equal(logits(model, tokens), plain) and torch.equal(logits(wrapped, tokens), plain)
    assert not trained(model)


@EACH
@EVERY
def test_merge_and_unload_gives_a_plain_model_of_the_same_function(family, form, make):
    model, base, tokens = make(family, form, modules_to_save=[HEAD[family]])
    steps(model, tokens)
    now, twin = logits(model, tokens), merge(copy.deepcopy(model.get_base_model()))
    merged = model.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert all(torch.equal(t, merged.state_dict()[name]) for name, t in twin.state_dict().items())
    torch.testing.assert_close(logits(merged, tokens), now, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="were unloaded"):
        model.save_pretrained("x")


@pytest.fixture
def plain_of(random_basis):
    """``plain_of(model_type)``: a tiny model without a head, in float32, bases for all of its MLPs, an input."""
    from transformers import AutoConfig, AutoModel

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    own = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
        "mixtral": small | {"num_local_experts": 3, "num_key_value_heads": 2},
        "albert": small | {"embedding_size": 16},
    }

    def made(model_type):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, vocab_size=50, **own[model_type])
        model = AutoModel.from_config(config).eval()
        bases = {t.kind: random_basis(*t.shape) for t in find_targets(model, "all-mlp")}
        return model, bases, torch.randint(3, 50, (2, 7))

    return made


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "albert"])
@EVERY
def test_the_base_comes_back_whatever_a_target_lies_in(model_type, form, plain_of):
    """Transposed in a Conv1D; in a 3-D parameter, beside a choice of implementation; shared by blocks."""
    model, bases, tokens = plain_of(model_type)

    def output(model):
        return model(input_ids=tokens).last_hidden_state.detach()

    plain, before = output(model), {name: t.clone() for name, t in model.state_dict().items()}
    modules, parameters = [type(m) for m in model.modules()], [n for n, _ in model.named_parameters()]
    wrapped = get_sparsegrad_model(model, SparseGradConfig(k=9, **FORMS[form] | {"select_in": "step"}), bases)
    optimizer = SparseGradAdamW(param_groups(wrapped), lr=1e-2)
    torch.log_softmax(wrapped(input_ids=tokens).last_hidden_state, -1)[..., 0].square().sum().backward()
    optimizer.step()
    now = output(wrapped)
    assert (now - plain).abs().max() > 1e-4
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped), plain)
    assert torch.equal(output(wrapped), now)
    wrapped.merge_adapter()
    torch.testing.assert_close(output(wrapped), now, rtol=0, atol=1e-4)
    assert wrapped.unload() is model
    assert torch.equal(output(model), plain)
    assert [type(m) for m in model.modules()] == modules and [n for n, _ in model.named_parameters()] == parameters
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def own_bases(model):
    return {layer.kind: layer.basis for layer in sparsegrad_layers(model).values()}


def test_a_tied_head_stays_tied_and_its_state_has_it_once(tiny_transformer, transformer_bases):
    base, patterns, tokens = tiny_transformer("llama", tie_word_embeddings=True)
    config = SparseGradConfig(k=K, target_modules=patterns, modules_to_save=["lm_head"])
    model, other = (get_sparsegrad_model(copy.deepcopy(base), config, transformer_bases()) for _ in range(2))
    steps(model, tokens)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.requires_grad
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    state = model.state_dict()
    assert "base_model.lm_head.weight" not in state and "base_model.model.embed_tokens.weight" in state
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)))  # strictly
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    model.unload()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, tokens), logits(base, tokens))


def test_what_was_merged_or_left_in_inference_mode_can_be_trained(make):
    model, _, tokens = make()
    steps(model, tokens)
    with torch.inference_mode():
        with model.disable_adapter():
            logits(model, tokens)
        merged = model.merge_and_unload()
    merged.requires_grad_(True)(input_ids=tokens).logits.sum().backward()
    assert all(p.grad is not None for p in merged.bert.encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_a_model_that_was_moved_has_its_base_there(form, dtype, make):
    """As ``base.to(dtype)`` has it."""
    model, base, tokens = make(form=form, modules_to_save=["classifier"])
    steps(model, tokens)
    model.to(dtype)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), logits(base.to(dtype), tokens))
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert logits(model, tokens).dtype == torch.float64


@EVERY
def test_without_the_bases_weights_what_needs_them_is_refused_in_one_line(form, make, transformer_bases):
    model, base, tokens = make(form=form, keep_base=False)
    steps(model, tokens)
    now, config = logits(model, tokens), model.peft_config["default"]
    if form == "side":  # its weights are the base's
        refresh(model, {"up": own_bases(model)["up"]})
        with model.disable_adapter():
            assert torch.equal(logits(model, tokens), logits(base, tokens))
        model.add_adapter("b", config, transformer_bases())
        torch.testing.assert_close(logits(model, tokens), now, rtol=0, atol=1e-12)
        return
    for refused in (
        model.unload,
        model.disable_adapter().__enter__,
        lambda: model.add_adapter("b", config, own_bases(model)),
        lambda: [model.merge_adapter(), model.disable_adapter().__enter__()],
    ):
        with pytest.raises(ValueError, match=r"needs the weights of the base model, .*keep_base=False"):
            refused()
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), now)
    assert not sparsegrad_layers(model.merge_and_unload())


class Packed(nn.Linear):
    """Keeps its weight as bytes in one column, as bitsandbytes does."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.abs().max().item() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8).view(torch.uint8)
        self.weight, self.bias = nn.Parameter(packed.reshape(-1, 1), requires_grad=False), linear.bias

    def forward(self, x):
        weight = self.weight.view(torch.int8).reshape(self.out_features, self.in_features)
        return nn.functional.linear(x, weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_quantised_base_comes_back_as_it_is_kept_inside(keep_base, blocks, block_bases, block_patterns):
    model = blocks(dtype=torch.float32)
    for block in model.layers:
        block.up, block.down = Packed(block.up), Packed(block.down)
    x = torch.randn(4, 8)
    plain, linears = model(x).detach(), [block.up for block in model.layers]
    config = SparseGradConfig(k=9, form="truncated", target_modules=block_patterns, keep_base=keep_base)
    model = get_sparsegrad_model(model, config, block_bases())
    assert model.get_nb_trainable_parameters()[1] == sum(p.numel() for p in blocks().parameters()) + 4 * 9
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-1)
    model(x).square().sum().backward()
    optimizer.step()
    now = model(x).detach()
    assert not torch.equal(now, plain)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), now)
    model.merge_adapter()
    torch.testing.assert_close(model(x), now, rtol=0, atol=1e-5)
    model = model.unload()
    assert torch.equal(model(x), plain) and [block.up for block in model.layers] == linears


# ---- several adapters ----


CONFIGS = {
    "a": {"k": K, "modules_to_save": ["classifier"]},
    "b": {"k": 5, "form": "truncated", "update": "side", "layers_to_transform": [1]},
    "c": {"density": 0.05, "form": "rotated", "modules_to_save": ["pooler.dense"]},
}


@pytest.fixture(params=[torch.float64])
def three(tiny_transformer, random_basis, request):
    """A model with adapters a, b, c of other forms, k, bases, targets and heads, each trained some steps; its base."""
    model, patterns, tokens = tiny_transformer("bert", dtype=request.param)
    base, _, _ = tiny_transformer("bert", dtype=request.param)
    for number, (name, own) in enumerate(CONFIGS.items()):
        targets = {"up": patterns["up"]} if name == "b" else patterns
        config = SparseGradConfig(target_modules=targets, **own)
        bases = {"up": random_basis(24, 16, 3 * number), "down": random_basis(16, 24, 3 * number + 1)}
        if number:
            model.add_adapter(name, config, bases)
            model.set_adapter(name)
        else:
            model = get_sparsegrad_model(model, config, bases, name)
        steps(model, tokens, 2)
    return model, base, tokens


@pytest.mark.parametrize("three", [torch.float64, torch.bfloat16], indirect=True)
def test_adapters_set_by_turns_give_the_same_bits_each_time(three):
    model, base, tokens = three
    assert model.active_adapter == "c" and list(model.peft_config) == ["a", "b", "c"]
    trained = logits(model, tokens)
    first = {}
    for name in "acbcabbca":
        model.set_adapter(name)
        assert model.active_adapters == [name]
        now = logits(model, tokens)
        assert torch.equal(now, first.setdefault(name, now))
    assert len({tuple(found.flatten().tolist()) for found in first.values()}) == 3
    atol = 1e-12 if base.dtype == torch.float64 else 1e-2
    torch.testing.assert_close(first["c"], trained, rtol=0, atol=atol)
    assert torch.equal(logits(model.unload(), tokens), logits(base, tokens))


def test_a_refreshed_adapter_waits_and_comes_back_with_its_bases(make, random_basis):
    model, base, tokens = make(form="truncated")
    model.add_adapter("b", model.peft_config["default"], {"up": random_basis(24, 16), "down": random_basis(16, 24)})
    steps(model, tokens)
    refresh(model, {"up": random_basis(24, 16, 5), "down": random_basis(16, 24, 6)})
    steps(model, tokens)
    now, bases = logits(model, tokens), {kind: basis.U.clone() for kind, basis in own_bases(model).items()}
    model.set_adapter("b")
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), now)
    assert all(torch.equal(basis.U, bases[kind]) for kind, basis in own_bases(model).items())
    assert torch.equal(logits(model.unload(), tokens), logits(base, tokens))


@pytest.mark.cuda
@EVERY
def test_on_a_device_the_base_waits_on_the_cpu(form, make):
    model, base, tokens = make(form=form, modules_to_save=["classifier"], dtype=torch.float32)
    model, base, tokens = model.cuda(), base.cuda(), tokens.cuda()
    plain = logits(base, tokens)
    optimizer = steps(model, tokens)
    now, taken = logits(model, tokens), torch.cuda.memory_allocated()
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
    assert torch.cuda.memory_allocated() == taken
    steps(model, tokens, 1, optimizer)
    assert not torch.equal(logits(model, tokens), now)
    assert torch.equal(logits(model.unload(), tokens), plain)


def test_training_goes_on_with_a_new_optimizer_and_the_stale_one_fails(three):
    model, _, tokens = three
    stale = SparseGradAdamW(param_groups(model), lr=1e-2)
    model.set_adapter("a")
    with pytest.raises(ValueError, match="taken out of the model: another adapter was set"):
        stale.step()
    before = logits(model, tokens)
    optimizer = steps(model, tokens)
    assert not torch.equal(logits(model, tokens), before)
    with model.disable_adapter(), pytest.raises(ValueError, match="taken out of the model"):
        optimizer.step()
    model.merge_adapter()
    with pytest.raises(ValueError, match="taken out of the model"):
        optimizer.step()
    with pytest.raises(ValueError, match="training needs the adapter in its place, and it is merged or disabled"):
        param_groups(model)
    with pytest.raises(ValueError, match="set_adapter needs"):
        model.set_adapter("b")
    model.unmerge_adapter()
    steps(model, tokens, 1, optimizer)
    now = logits(model, tokens)
    model.set_adapter("b")
    model.set_adapter("a")
    torch.testing.assert_close(logits(model, tokens), now, rtol=0, atol=1e-12)


def test_an_added_adapter_changes_nothing_and_leaves_the_active_ones_layers(make):
    model, base, tokens = make()
    optimizer = steps(model, tokens)
    now, config = logits(model, tokens), model.peft_config["default"]
    model.add_adapter("b", config, own_bases(model))
    assert torch.equal(logits(model, tokens), now) and model.active_adapter == "default"
    steps(model, tokens, 1, optimizer)
    model.set_adapter("b", inference_mode=True)
    torch.testing.assert_close(logits(model, tokens), logits(base, tokens), rtol=0, atol=1e-12)
    assert not trained(model)
    with pytest.raises(ValueError, match="'b' is set for inference"):
        param_groups(model)
    model.set_adapter("b")
    assert len(trained(model)) == 4


def test_deleting_the_active_adapter_sets_the_first_of_the_others(three):
    model, base, tokens = three
    with pytest.warns(UserWarning, match="'c' was active; 'a' is set now"):
        model.delete_adapter("c")
    assert model.active_adapter == "a"
    model.delete_adapter("b")
    with pytest.raises(ValueError, match="'a' is the only adapter"):
        model.delete_adapter("a")
    with pytest.raises(ValueError, match="no adapter 'c'; there are a"):
        model.set_adapter("c")
    assert torch.equal(logits(model.unload(), tokens), logits(base, tokens))


def test_an_adapter_that_does_not_go_in_leaves_the_active_one(three, monkeypatch):
    model, base, tokens = three
    before, layers = logits(model, tokens), sparsegrad_layers(model)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("sparsegrad.named.put_adapter", fail)
    with pytest.raises(MemoryError):
        model.set_adapter("a")
    assert model.active_adapter == "c" and sparsegrad_layers(model) == layers
    assert torch.equal(logits(model, tokens), before)
    steps(model, tokens, 1)
    assert torch.equal(logits(model.unload(), tokens), logits(base, tokens))


# ---- files ----


@pytest.mark.parametrize(
    ("family", "form", "bases"),
    [*(("bert", form, "inside") for form in FORMS), ("bert", "side", "reference"), ("llama", "folded", "reference")],
)
def test_a_saved_adapter_comes_back(family, form, bases, make, tmp_path):
    model, base, tokens = make(family, form, modules_to_save=[HEAD[family]])
    given = own_bases(model)
    save_bases(tmp_path / "bases.safetensors", given)
    steps(model, tokens)
    model.save_pretrained(tmp_path / "a", bases=bases)
    files = {"adapter_config.json", "adapter_model.safetensors"} | (
        {"bases.safetensors"} if bases == "inside" else set()
    )
    assert {file.name for file in (tmp_path / "a").iterdir()} == files
    if bases == "reference":
        before = snapshot(base)
        with pytest.raises(ValueError, match="refers to bases that it does not hold"):
            SparseGradModel.from_pretrained(base, tmp_path / "a")
        assert_unchanged(base, before)
    one = SparseGradModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "a", bases=None if bases == "inside" else tmp_path / "bases.safetensors"
    )
    torch.testing.assert_close(logits(one, tokens), logits(model, tokens), rtol=0, atol=1e-12)
    assert one.peft_config == model.peft_config and not one.training and not trained(one)
    one.save_pretrained(tmp_path / "b", bases=bases)  # untouched, it is written as it was read
    for name in files - {"adapter_config.json"}:
        (tensors, metadata), (again, same) = (load_tensors(tmp_path / folder / name) for folder in "ab")
        assert metadata == same and tensors.keys() == again.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())
    two = SparseGradModel.from_pretrained(
        base, tmp_path / "b", "two", bases=None if bases == "inside" else given, is_trainable=True
    )
    assert torch.equal(logits(one, tokens), logits(two, tokens)) and trained(two)
    steps(two, tokens)
    with two.disable_adapter(), one.disable_adapter():
        assert torch.equal(logits(one, tokens), logits(two, tokens))


def test_each_adapter_has_a_folder_of_its_name_and_the_default_the_directory(three, tmp_path):
    model, base, tokens = three
    outputs = {}
    for name in "abc":
        model.set_adapter(name)
        outputs[name] = logits(model, tokens)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "other", selected_adapters=["b"])
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c", "other"}
    assert {p.name for p in (tmp_path / "other").iterdir()} == {"b"}
    other = SparseGradModel.from_pretrained(base, tmp_path / "b")
    other.load_adapter(tmp_path / "a", "a")
    other.load_adapter(tmp_path / "c", "sea")
    for name, known in {"default": "b", "a": "a", "sea": "c"}.items():
        other.set_adapter(name)
        assert torch.equal(logits(other, tokens), outputs[known])
    other.save_pretrained(tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} == {
        *("a", "sea", "adapter_config.json", "adapter_model.safetensors", "bases.safetensors")
    }
    values = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert values["peft_type"] == "SPARSEGRAD" and values["k"] == 5 and set(values["target_modules"]) == {"up"}


def test_bases_may_be_a_file_or_none(tiny_transformer, transformer_bases, tmp_path):
    save_bases(tmp_path / "bases.safetensors", transformer_bases())
    outputs = []
    for bases in (tmp_path / "bases.safetensors", str(tmp_path / "bases.safetensors"), transformer_bases(), None):
        model, patterns, tokens = tiny_transformer("bert")
        model = get_sparsegrad_model(model, SparseGradConfig(k=K, target_modules=patterns), bases)
        steps(model, tokens)
        outputs.append(logits(model, tokens))
    for found in outputs[:2]:
        assert torch.equal(found, outputs[2])
    assert not torch.equal(outputs[2], outputs[3])
    model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / "bases.safetensors").exists()
    one = SparseGradModel.from_pretrained(tiny_transformer("bert")[0], tmp_path / "none")
    torch.testing.assert_close(logits(one, tokens), outputs[3], rtol=0, atol=1e-12)
    assert load_bases(tmp_path / "bases.safetensors")[0].keys() == {"up", "down"}


# ---- what it passes for ----


@EACH
def test_it_passes_for_the_model(family, make):
    model, base, tokens = make(family)
    assert isinstance(model, SparseGradModel) and type(model).__name__ == type(base).__name__
    assert inspect.signature(type(model).forward) == inspect.signature(type(base).forward)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    from transformers.utils.generic import can_return_loss, find_labels

    assert find_labels(type(model)) == find_labels(type(base)) == ["labels"]
    assert can_return_loss(type(model)) is can_return_loss(type(base))
    assert model.config.model_type == family and model.device == base.device and model.dtype == base.dtype
    assert model.get_base_model() is model.base_model and type(model.get_base_model()) is type(base)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    if family == "llama":
        assert torch.equal(
            model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0),
            base.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0),
        )
    from transformers.trainer_utils import validate_quantization_for_training

    model.get_base_model().is_quantized, model.get_base_model().hf_quantizer = True, SimpleNamespace(is_trainable=True)
    validate_quantization_for_training(model)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model.get_base_model())
    model.train()
    model.activation_checkpointing_enable()
    steps(model, tokens, 1)
    assert model.is_gradient_checkpointing


@EVERY
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(form, copier, make, transformer_bases):
    model, base, tokens = make(form=form, modules_to_save=["classifier"])
    model.add_adapter("b", model.peft_config["default"], transformer_bases())
    steps(model, tokens, 1)
    now = logits(model, tokens)
    model.merge_adapter()
    twin = copier(model)
    model.unmerge_adapter()
    twin.unmerge_adapter()
    assert type(twin) is type(model) and torch.equal(logits(twin, tokens), now)
    steps(twin, tokens, 1)
    assert not torch.equal(logits(twin, tokens), now)
    twin.set_adapter("b")
    assert torch.equal(logits(twin.unload(), tokens), logits(base, tokens))
    assert torch.equal(logits(model, tokens), now)
    steps(copier(model), tokens, 1)


def test_its_state_holds_each_tensor_once_and_loads(make):
    model, _, tokens = make(modules_to_save=["classifier"])
    steps(model, tokens)
    saved = safetensors.torch.save(model.state_dict())  # refuses shared memory
    other, _, _ = make(modules_to_save=["classifier"])
    other.load_state_dict(safetensors.torch.load(saved))
    assert torch.equal(logits(other, tokens), logits(model, tokens))

    other.load_state_dict({}, strict=False)
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    with pytest.raises(AttributeError, match="base_model"):
        _ = type(model).__new__(SparseGradModel, other).base_model  # nothing is in it yet


@EVERY
def test_an_adapter_is_as_small_after_a_checkpoint(form, make, tmp_path):
    """As the Trainer loads its best one, or resumes; of another base anything may differ."""
    model, base, tokens = make(form=form)
    optimizer = steps(model, tokens)
    saved = safetensors.torch.save(model.state_dict())
    model.save_pretrained(tmp_path / "a")
    expected, metadata = load_tensors(tmp_path / "a" / "adapter_model.safetensors")
    steps(model, tokens, 1, optimizer)
    other, _, _ = make(form=form)
    for one in (model, other):
        one.load_state_dict(safetensors.torch.load(saved))
        one.save_pretrained(tmp_path / "b")
        tensors, same = load_tensors(tmp_path / "b" / "adapter_model.safetensors")
        assert same == metadata and all(torch.equal(t, tensors[name]) for name, t in expected.items())
    optimizer = SparseGradAdamW(param_groups(other), lr=1e-2)
    steps(other, tokens, 2, optimizer)
    now = logits(other, tokens)
    other.save_pretrained(tmp_path / "c")
    one = SparseGradModel.from_pretrained(base, tmp_path / "c")
    torch.testing.assert_close(logits(one, tokens), now, rtol=0, atol=1e-12)
    if form in ("folded", "rotated"):
        shifted, _, _ = make(form=form, prepare=lambda m: m.bert.encoder.layer[0].output.dense.weight.data.add_(0.1))
        shifted.load_state_dict(safetensors.torch.load(saved))
        shifted.save_pretrained(tmp_path / "d")
        tensors, _ = load_tensors(tmp_path / "d" / "adapter_model.safetensors")
        assert [name for name in tensors if name.startswith("weight.")] == ["weight.bert.encoder.layer.0.output.dense"]


# ---- beside peft ----


class Case:
    """The same calls on peft's LoRA model and on this one: what their values, words and files have in common."""

    def __init__(self, of, tiny_transformer, transformer_bases):
        self.model, patterns, self.tokens = tiny_transformer("bert")
        self.base, _, _ = tiny_transformer("bert")
        self.other, _, _ = tiny_transformer("bert")
        self.plain = logits(self.base, self.tokens)
        own = {"modules_to_save": ["classifier"]}
        if of == "sparsegrad":
            config, self.type, bases = (
                SparseGradConfig(k=K, target_modules=patterns, **own),
                SparseGradModel,
                transformer_bases(),
            )
            self.model = get_sparsegrad_model(self.model, config, bases)
            self.more = (config, bases)
            steps(self.model, self.tokens)
        else:
            peft = pytest.importorskip("peft")
            config, self.type = peft.LoraConfig(target_modules=["intermediate.dense"], **own), peft.PeftModel
            self.model = peft.get_peft_model(self.model, config).double()
            self.more = (config,)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(0.1 * parameter.requires_grad)
        self.model.eval()
        self.now = logits(self.model, self.tokens)
        assert (self.now - self.plain).abs().max() > 1e-3

    def gives(self, expected, model=None):
        torch.testing.assert_close(logits(model or self.model, self.tokens), expected, rtol=0, atol=1e-9)

    # one word each

    def print_trainable_parameters(self, path, capsys):
        self.model.print_trainable_parameters()
        line = r"trainable params: ([\d,]+) \|\| all params: ([\d,]+) \|\| trainable%: (\d+\.\d{4})\b.*\n"
        printed = re.fullmatch(line, capsys.readouterr().out)
        trained, every = (int(n.replace(",", "")) for n in printed.groups()[:2])
        assert (trained, every) == self.model.get_nb_trainable_parameters() and 0 < trained < every
        assert float(printed[3]) == round(100 * trained / every, 4)

    def active_adapter(self, *_):
        assert self.model.active_adapter == "default" and self.model.active_adapters == ["default"]
        assert list(self.model.peft_config) == ["default"]

    def requires_grad(self, *_):
        names = trained(self.model)
        assert len([name for name in names if "classifier" in name]) == 2
        assert all("classifier" in name or "intermediate.dense" in name or "output.dense" in name for name in names)
        assert not any("embeddings" in name or "attention" in name for name in names)

    def disable_adapter(self, *_):
        with self.model.disable_adapter():
            self.gives(self.plain)
        self.gives(self.now)

    def merge_adapter(self, *_):
        self.model.merge_adapter()
        self.gives(self.now)
        with self.model.disable_adapter():
            self.gives(self.plain)

    def unmerge_adapter(self, *_):
        self.model.merge_adapter()
        self.model.unmerge_adapter()
        self.gives(self.now)
        with self.model.disable_adapter():
            self.gives(self.plain)

    def merge_and_unload(self, *_):
        plain = self.model.merge_and_unload()
        assert type(plain) is type(self.base) and [n for n, _ in plain.named_parameters()] == [
            n for n, _ in self.base.named_parameters()
        ]
        self.gives(self.now, plain)
        assert not trained(plain) - {"classifier.weight", "classifier.bias"}

    def unload(self, *_):
        plain = self.model.unload()
        assert type(plain) is type(self.base)
        assert torch.equal(
            plain.bert.encoder.layer[0].intermediate.dense.weight,
            self.base.bert.encoder.layer[0].intermediate.dense.weight,
        )

    def add_adapter(self, *_):
        self.model.add_adapter("b", *self.more)
        assert self.model.active_adapter == "default" and list(self.model.peft_config) == ["default", "b"]
        self.gives(self.now)

    def set_adapter(self, *_):
        self.model.add_adapter("b", *self.more)
        self.model.set_adapter("b")
        assert self.model.active_adapter == "b"
        self.gives(self.plain)
        self.model.set_adapter("default")
        self.gives(self.now)

    def set_adapter_for_inference(self, *_):
        self.model.set_adapter("default", inference_mode=True)
        assert not trained(self.model)
        self.model.set_adapter("default")
        assert trained(self.model)

    def delete_adapter(self, *_):
        self.model.add_adapter("b", *self.more)
        with pytest.warns(UserWarning, match="default.*active"):
            self.model.delete_adapter("default")
        assert self.model.active_adapter == "b" and list(self.model.peft_config) == ["b"]
        self.gives(self.plain)

    def unknown_names(self, *_):
        for refused in (
            lambda: self.model.set_adapter("c"),
            lambda: self.model.delete_adapter("c"),
            lambda: self.model.add_adapter("default", *self.more),
            lambda: self.model.save_pretrained("never", selected_adapters=["c"]),
        ):
            with pytest.raises(ValueError):
                refused()

    def save_pretrained(self, path, *_):
        self.model.add_adapter("b", *self.more)
        self.model.save_pretrained(path)
        for directory in (path, path / "b"):
            assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in directory.iterdir()}
        values = json.loads((path / "adapter_config.json").read_text())
        assert values["peft_type"] == type(self.more[0])(**({"k": 1} if len(self.more) > 1 else {})).peft_type
        assert values["modules_to_save"] == ["classifier"] and {"task_type", "base_model_name_or_path"} <= values.keys()

    def from_pretrained(self, path, *_):
        self.model.save_pretrained(path)
        model = self.type.from_pretrained(self.base, path)
        self.gives(self.now, model)
        assert not model.training and not trained(model) and isinstance(model, self.type)
        model = self.type.from_pretrained(self.other, path, "mine", is_trainable=True)
        assert trained(model) and model.active_adapter == "mine"

    def load_adapter(self, path, *_):
        self.model.save_pretrained(path)
        model = type(self)._other(self)
        model.load_adapter(path, "mine")
        assert model.active_adapter == "default"
        self.gives(self.plain, model)
        model.set_adapter("mine")
        self.gives(self.now, model)

    def _other(self):
        if len(self.more) > 1:
            return get_sparsegrad_model(self.base, *self.more)
        import peft

        return peft.get_peft_model(self.base, *self.more).eval()

    def get_base_model(self, *_):
        assert type(self.model.get_base_model()) is type(self.base)

    def attributes(self, *_):
        assert self.model.config is self.model.get_base_model().config and self.model.device.type == "cpu"
        assert self.model.get_input_embeddings() is self.model.bert.embeddings.word_embeddings
        assert self.model.num_labels == 2

    def copies(self, *_):
        twin = copy.deepcopy(self.model)
        self.gives(self.now, pickle.loads(pickle.dumps(twin)))


@pytest.mark.parametrize("word", [name for name in vars(Case) if not name.startswith("_") and name != "gives"])
@pytest.mark.parametrize("of", ["peft", "sparsegrad"])
def test_the_words_of_peft(of, word, tiny_transformer, transformer_bases, tmp_path, capsys):
    getattr(Case(of, tiny_transformer, transformer_bases), word)(tmp_path, capsys)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert capsys.readouterr().out.startswith("trainable params: ")
    x = names["batches"][0]["input_ids"]
    model, plain = names["model"].eval(), names["plain"].eval()
    torch.testing.assert_close(logits(plain, x), logits(model, x), rtol=0, atol=1e-5)


def test_the_page_says_which_words_there_are():
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    fields = inspect.signature(SparseGradConfig).parameters
    for words, beside in rows:
        for word in re.findall(r"`(\w+)", words):
            there = hasattr(SparseGradModel, word) or hasattr(sparsegrad, word) or word in fields
            assert there != beside.startswith("absent"), word
    assert len(rows) > 10 and any(beside.startswith("absent") for _, beside in rows)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "k=None, density=None; give one of them"),
        ({"k": 3, "density": 0.1}, "k=3, density=0.1; give one of them"),
        ({"k": 0}, "k=0, keep=None; allowed: whole numbers from 1"),
        ({"k": {"up": 2.5}}, "k={'up': 2.5}, keep=None; allowed"),
        ({"k": 9, "form": "truncated", "keep": 0}, "k=9, keep=0; allowed"),
        ({"density": 2}, "density=2; allowed: above 0, at most 1"),
        ({"density": {"up": 0.0}}, "density=0.0; allowed"),
        ({"k": 1, "form": "sparse"}, "form='sparse'; allowed: folded, rotated, truncated"),
        ({"k": 1, "select_in": "later"}, "select_in='later'; allowed: step, backward"),
        ({"k": 1, "rotation": "fp8"}, "rotation='fp8'; allowed: auto"),
        ({"k": 1, "update": "aside"}, "update='aside'; allowed: None, in_place, side"),
        ({"k": 1, "ranks": (2, 2)}, "ranks=.* is no option of form='folded'"),
        ({"k": 1, "task_type": "SEQ"}, "task_type='SEQ'; allowed: SEQ_CLS"),
        ({"k": 1, "keep_base": "no"}, "keep_base='no'; allowed: True, False"),
        ({"k": 1, "target_modules": {}}, "target_modules={}; allowed"),
        ({"k": 1, "target_modules": [1]}, "target_modules=.1.; allowed"),
        ({"k": 1, "modules_to_save": "classifier"}, "modules_to_save='classifier'; allowed: a list of str"),
        ({"k": 1, "layers_to_transform": ["0"]}, "layers_to_transform=.'0'.; allowed: a list of int"),
    ],
    ids=str,
)
def test_a_configuration_out_of_range_is_refused_when_it_is_made(config, text):
    with pytest.raises(ValueError, match=text):
        SparseGradConfig(**config)


def test_a_configuration_is_its_file(tmp_path):
    config = SparseGradConfig(
        k={"up": 4}, form="truncated", ranks={"up": (2, 2)}, layers_to_transform=range(2), target_modules=("a", "b")
    )
    assert config.layers_to_transform == [0, 1] and config.target_modules == ["a", "b"]
    config.save_pretrained(tmp_path)
    read = SparseGradConfig.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict() == json.loads((tmp_path / "adapter_config.json").read_text())
    for change, text in [
        ({"peft_type": "LORA"}, "peft_type='LORA'; a SparseGradConfig has 'SPARSEGRAD'"),
        ({"lora_alpha": 1}, "unknown keys lora_alpha; a SparseGradConfig has k, density"),
        ({"peft_version": "0.21"}, "unknown keys peft_version; .* of sparsegrad.peft, whose adapters peft.PeftModel"),
        ({"k": -1}, "k=-1"),
    ]:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict() | change))
        with pytest.raises(ValueError, match=rf"adapter_config.json: .*{text}"):
            SparseGradConfig.from_pretrained(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(ValueError, match="adapter_config.json"):
            SparseGradConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="can't be read .*: give a directory of save_pretrained"):
        SparseGradConfig.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"modules_to_save": ["classifer"]}, "modules_to_save: no module is, or ends with, classifer"),
        ({"modules_to_save": ["encoder"]}, r"modules_to_save holds bert.encoder.layer.0.intermediate.dense, .*, which"),
        ({"target_modules": ["nothing"]}, "'nothing', the end of no layer's name"),
        ({"k": {"up": 3}}, "no k for layer kind 'down'"),
        ({"k": 10**6}, "k=1000000; a matrix of shape"),
        ({"form": "truncated"}, "needs a basis"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_leaves_the_model_as_it_was(
    config, text, tiny_transformer, transformer_bases
):
    model, patterns, _ = tiny_transformer("bert")
    before, flags = snapshot(model), trained(model)
    parameters = list(model.parameters())
    own = {"k": 3, "target_modules": patterns, "modules_to_save": ["classifier"]} | config
    with pytest.raises(ValueError, match=text):
        get_sparsegrad_model(model, SparseGradConfig(**own), None if "form" in config else transformer_bases())
    assert_unchanged(model, before)
    assert trained(model) == flags and all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    wrapped = get_sparsegrad_model(model, SparseGradConfig(k=3, target_modules=patterns), transformer_bases())
    before = snapshot(wrapped)
    with pytest.raises(ValueError, match=text):
        wrapped.add_adapter("b", SparseGradConfig(**own), None if "form" in config else transformer_bases())
    assert_unchanged(wrapped, before)
    assert list(wrapped.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", 3])
def test_a_name_that_is_no_folder_is_refused(name, make):
    model, _, _ = make()
    with pytest.raises(ValueError, match="adapter_name="):
        model.add_adapter(name, model.peft_config["default"], own_bases(model))


def test_what_no_other_adapter_could_have_back_is_refused(make, tmp_path):
    """A parameter that was trained without being named."""
    model, _, tokens = make()
    config = model.peft_config["default"]
    model.add_adapter("b", config, own_bases(model))
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    now = logits(model, tokens)
    for refused in (lambda: model.set_adapter("b"), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"classifier.bias .*modules_to_save does not name them"):
            refused()
    assert torch.equal(logits(model, tokens), now) and not list(tmp_path.iterdir())
    for refused in (
        lambda: model.add_adapter("b", config, own_bases(model)),
        lambda: model.load_adapter(tmp_path, "b"),
    ):
        with pytest.raises(ValueError, match="there is an adapter 'b'"):
            refused()
    for refused in (
        lambda: model.save_pretrained(tmp_path, bases="outside"),
        lambda: model.save_pretrained(tmp_path, ["c"]),
        lambda: get_sparsegrad_model(model, config, own_bases(model)),
        lambda: get_sparsegrad_model(model.get_base_model(), config, own_bases(model)),
        lambda: model.add_adapter("c", config.to_dict(), own_bases(model)),
    ):
        with pytest.raises(
            ValueError,
            match="bases='outside'|no adapter 'c'|has adapters already|holds SparseGrad|config is a builtins.dict",
        ):
            refused()


def test_files_of_two_adapters_and_other_bases_are_refused(three, tmp_path, random_basis):
    model, base, _ = three
    model.save_pretrained(tmp_path)
    before = snapshot(base)
    (tmp_path / "a" / "adapter_config.json").write_bytes((tmp_path / "c" / "adapter_config.json").read_bytes())
    with pytest.raises(ValueError, match="the configuration has .*, the adapter was made with"):
        SparseGradModel.from_pretrained(base, tmp_path / "a")
    with pytest.raises(ValueError, match="is not the one that the adapter was trained in"):
        SparseGradModel.from_pretrained(base, tmp_path / "b", bases={"up": random_basis(24, 16, 9)})
    base.bert.embeddings.word_embeddings.weight.data.add_(1.0)
    with pytest.raises(ValueError, match="an adapter of another base model"):
        SparseGradModel.from_pretrained(base, tmp_path / "b")
    base.bert.embeddings.word_embeddings.weight.data.copy_(before[1]["bert.embeddings.word_embeddings.weight"])
    assert_unchanged(base, before)
