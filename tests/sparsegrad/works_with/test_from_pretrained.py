"""A checkpoint of unmerged layers in a plain model: the same function, or an error; never another function."""

import pytest
import torch
from safetensors.torch import load_file

from sparsegrad import SparseGradAdamW, find_targets, merge, param_groups, sparsegrad_layers, sparsify

LOUD = [{"form": "rotated"}, {"form": "truncated", "update": "side"}]
PLAIN = [{"form": "folded"}, {"form": "truncated", "update": "in_place"}]
by_options = pytest.mark.parametrize("options", LOUD + PLAIN, ids=lambda o: "-".join(o.values()))
loud = pytest.mark.parametrize("options", LOUD, ids=lambda o: o["form"])


@pytest.fixture
def made(tiny_transformer, transformer_bases):
    """``made(options, steps=2)``: a BERT in float32 after two steps, and an input."""

    def make(options, steps=2):
        model, patterns, tokens = tiny_transformer("bert", dtype=torch.float32)
        sparsify(model, transformer_bases(), 9, patterns, **options)
        optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=tokens).logits.square().sum().backward()
            optimizer.step()
        return model, tokens

    return make


@pytest.fixture
def auto():
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


@loud
def test_transformers_refuses_what_is_not_its_own(options, made, auto, tmp_path):
    """What a user sees: their own error, and a report that names every such weight."""
    made(options)[0].save_pretrained(tmp_path)
    for arguments in ({}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            auto.from_pretrained(tmp_path, **arguments)


@pytest.mark.parametrize("options", PLAIN, ids=lambda o: "-".join(o.values()))
def test_what_is_a_plain_models_loads_with_the_same_function(options, made, auto, tmp_path):
    model, tokens = made(options)
    model.save_pretrained(tmp_path)
    plain = auto.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(input_ids=tokens).logits, model(input_ids=tokens).logits)


@by_options
def test_a_merged_one_loads_whatever_the_form(options, made, auto, tmp_path):
    model, tokens = made(options)
    trained = model(input_ids=tokens).logits
    merge(model).save_pretrained(tmp_path)
    plain = auto.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(input_ids=tokens).logits, trained)


@loud
@pytest.mark.parametrize("strict", [True, False])
def test_torch_refuses_it_too(options, strict, made, tiny_transformer):
    state = made(options)[0].state_dict()
    plain, patterns, _ = tiny_transformer("bert", dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"size mismatch for bert\.encoder\.layer\.0\.intermediate\.dense\.weight"):
        plain.load_state_dict(state, strict=strict)
    assert len(find_targets(plain, patterns)) == 4


@by_options
@pytest.mark.parametrize("assign", [False, True])
def test_a_sparsified_model_takes_its_own_state_to_the_bit(options, assign, made):
    model, tokens = made(options)
    other, _ = made(options, steps=0)
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_rotated_layer_refuses_a_plain_weight(made, tiny_transformer):
    """It would be taken for V W U^T."""
    plain, _, _ = tiny_transformer("bert", dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"intermediate\.dense\.weight of shape \(24, 16\) is a plain weight"):
        made({"form": "rotated"})[0].load_state_dict(plain.state_dict(), strict=False)


def test_a_rotated_layer_without_a_basis_keeps_the_plain_weight(tiny_transformer):
    model, patterns, _ = tiny_transformer("bert", dtype=torch.float32)
    before = model.state_dict()
    after = sparsify(model, None, 9, patterns, form="rotated").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(sparsegrad_layers(model)) == 4


# ---- matrices that the plain model keeps in another way ----


@pytest.fixture
def other(random_basis):
    """``other(model_type)``: a decoder sparsified where it keeps no ``nn.Linear``, and its targets and bases."""

    def make(model_type):
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
        own = {"mixtral": {"num_local_experts": 2}, "gpt2": {"n_embd": 16, "n_inner": 16, "n_head": 2, "n_layer": 1}}
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **sizes, **heads, **own[model_type])
        model = AutoModelForCausalLM.from_config(config).eval()
        bases = {t.kind: random_basis(*t.shape, dtype=torch.float32) for t in find_targets(model, "all-mlp")}
        return sparsify(model, bases, 9, "all-mlp")

    return make


@pytest.mark.parametrize("model_type", ["mixtral", "gpt2"])
def test_experts_and_conv1d_are_refused_and_resumed_and_loaded_when_merged(model_type, other, tmp_path):
    """transformers would write experts' layers in an older format's names, cut apart: their checkpoints keep them."""
    from transformers import AutoModelForCausalLM

    model, tokens = other(model_type), torch.arange(8)[None]
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    model(tokens).logits.square().sum().backward()
    optimizer.step()
    trained = model(tokens).logits
    model.save_pretrained(tmp_path / "unmerged")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "unmerged")
    resumed = other(model_type)
    keys = resumed.load_state_dict(load_file(tmp_path / "unmerged" / "model.safetensors"), strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) <= {"lm_head.weight"}  # tied
    assert torch.equal(resumed(tokens).logits, trained)
    for model_again in (merge(model), merge(resumed)):
        model_again.save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(plain(tokens).logits, trained, rtol=1e-5, atol=1e-5)
