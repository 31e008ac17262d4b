"""Every row of the table of ``target_modules="all-mlp"``, in each form, on a tiny model of that architecture."""

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsegrad import (
    SparseGradAdamW,
    architectures,
    collect_moments,
    find_targets,
    hosvd,
    load_adapter,
    merge,
    param_groups,
    save_adapter,
    sparsegrad_layers,
    sparsify,
)

FORMS = ["folded", "rotated", "truncated"]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "head_dim": 8,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
IMAGE = {"image_size": 8, "patch_size": 4}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
DISTILBERT = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 40}

# What differs from SIZES, by type; a name with a word behind it is another model of the type.
TINY = {
    **{name: {} for name in "bert roberta xlm-roberta camembert electra mpnet modernbert gpt_neox".split()},
    **{name: {} for name in "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3".split()},
    "albert": {"embedding_size": 8},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": DISTILBERT,
    "gemma3": {"text_config": SIZES, "vision_config": VISION | IMAGE, "mm_tokens_per_image": 4},
    "gpt2": GPT2,
    "mixtral": EXPERTS,
    "mt5": T5,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "qwen3_moe": MOE | {"mlp_only_layers": [0]},
    "t5": T5,
    "t5 gated": T5 | {"feed_forward_proj": "gated-gelu"},
    "vit": IMAGE | {"num_channels": 1},
}
WITH_OTHER_NAMES = (T5, GPT2, DISTILBERT)


@cache
def built(name):
    """A tiny model in float64, an input, and HOSVD bases of its own gradients."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    kind, own = name.split()[0], TINY[name]
    other = any(own.keys() >= names.keys() for names in WITH_OTHER_NAMES) or "text_config" in own
    config = AutoConfig.for_model(kind, **(own if other else SIZES | own))
    batched = {"experts_implementation": "batched_mm"} if "num_experts_per_tok" in own else {}  # grouped_mm: no float64
    model = AutoModel.from_config(config, **batched).double().eval()
    if kind == "vit":
        batch = {"pixel_values": torch.randn(2, 1, 8, 8, dtype=torch.float64)}
    else:
        batch = {"input_ids": torch.randint(3, 40, (2, 7))}
        if kind in ("t5", "mt5"):
            batch["decoder_input_ids"] = torch.randint(3, 40, (2, 5))
    moments = collect_moments(model, [batch] * 2, "all-mlp", loss_fn=loss)
    return model, batch, {kind: hosvd(found) for kind, found in moments.items()}


def output(model, batch):
    return model(**batch).last_hidden_state


def loss(model, batch):
    y = output(model, batch)
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).tanh().sum()


def moments_of(model, batch):
    torch.manual_seed(1)  # of dropout
    return collect_moments(model, [batch], "all-mlp", loss_fn=loss)


def train(model, batch, steps=2, lr=1e-2):
    optimizer = SparseGradAdamW(param_groups(model), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss(model, batch))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


def test_every_row_has_a_tiny_model():
    assert {name.split()[0] for name in TINY} == architectures().keys()


def test_the_table_is_in_order():
    table = architectures()
    assert list(table) == sorted(table)
    assert all("(?P<layer>" in pattern for kinds in table.values() for pattern in kinds.values())


def test_the_page_shows_the_table():
    """Names as people read them: N for the block's number."""
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    shown = {}
    for row in (row for row in page.splitlines() if "`<br>" in row):
        _, types, kinds, _, _ = row.split("|")
        shown |= {name: dict(re.findall(r"(\w+): `([^`]+)`", kinds)) for name in re.findall(r"`([^`]+)`", types)}

    def read(pattern):
        for written, meant in ((r"(.+\.)?", ""), (r"(?P<layer>\d+)", "N"), (r"\d+", "M"), ("\\", "")):
            pattern = pattern.replace(written, meant)
        return pattern

    table = {name: {kind: read(p) for kind, p in patterns.items()} for name, patterns in architectures().items()}
    assert shown == table


@pytest.mark.parametrize("name", TINY)
def test_the_rows_name_every_matrix_of_an_mlp(name):
    """Those and no others: what is neither attention nor embedding, head, norm or router."""
    model, _, _ = built(name)
    found = find_targets(model, "all-mlp")
    named = {t.name for t in found}
    outside = "attention attn pooler embed shared router EncDecAttention SelfAttention vision multi_modal lm_head"
    for module_name, module in model.named_modules():
        matrix = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if matrix and not any(word in module_name for word in outside.split()):
            assert module_name in named
    assert not any(word in target for target in named for word in outside.split())
    blocks = {t.layer for t in found}
    assert blocks == ({0} if name == "albert" else {0, 1})
    patterns = architectures()[name.split()[0]]
    unused = {"gate"} if name == "t5" else set()
    assert {t.kind for t in found} == patterns.keys() - unused


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TINY)
def test_the_way_there_and_back(name, form, tmp_path):
    """The function stays; steps move k entries of the targets alone; moments, merge and adapters know what they did."""
    base, batch, bases = built(name)
    model = copy.deepcopy(base).requires_grad_(False)
    targets = find_targets(model, "all-mlp")
    for target in targets:
        target.weight.requires_grad_(True)
    types = {n: type(m) for n, m in model.named_modules()}
    shapes = [(n, t.shape) for n, t in model.state_dict().items()]
    before = output(model, batch).detach()

    assert sparsify(model, bases, 9, "all-mlp", form=form) is model
    torch.testing.assert_close(output(model, batch).detach(), before, rtol=0, atol=1e-6)
    assert list(sparsegrad_layers(model)) == [t.name for t in targets]
    losses = train(model, batch)
    assert losses[1] < losses[0]
    after = output(model, batch).detach()
    assert (after - before).abs().max() > 1e-4

    save_adapter(tmp_path / "adapter.safetensors", model)
    loaded = load_adapter(tmp_path / "adapter.safetensors", copy.deepcopy(base))
    torch.testing.assert_close(output(loaded, batch).detach(), after, rtol=0, atol=1e-6)

    moments = moments_of(model, batch)
    assert merge(model) is model
    for kind, found in moments_of(model, batch).items():
        assert moments[kind].count == found.count
        torch.testing.assert_close(moments[kind].left, found.left, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(moments[kind].right, found.right, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(output(model, batch).detach(), after, rtol=0, atol=1e-6)
    assert types == {n: type(m) for n, m in model.named_modules()}
    assert shapes == [(n, t.shape) for n, t in model.state_dict().items()]
    start, inside = base.state_dict(), {id(t.weight) for t in find_targets(model, "all-mlp")}
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad is (id(parameter) in inside)
        assert torch.equal(parameter, start[parameter_name]) is (id(parameter) not in inside)
    for old, new in zip(find_targets(base, "all-mlp"), find_targets(model, "all-mlp"), strict=True):
        moved = bases[old.kind].rotate((new.matrix(new.weight) - old.matrix(old.weight)).detach())
        assert int((moved.abs() > 1e-9).sum()) <= 2 * 9


# ---- against nn.Linear: matrices that lie otherwise ----


class Linears(nn.Module):
    """A literal mixture of experts: one ``nn.Linear`` an expert and matrix, in lists."""

    def __init__(self, experts):
        super().__init__()
        self.act_fn = experts.act_fn
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(experts, name).detach()
            linears = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False).to(w) for w in weights)
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.data.copy_(weight)
            setattr(self, name, linears)

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for token, (experts, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
            for expert, share in zip(experts, shares, strict=True):
                gate, up = self.gate_up_proj[expert](x[token]).chunk(2)
                y[token] = y[token] + share * self.down_proj[expert](self.act_fn(gate) * up)
        return y


def twins(kind):
    """Models of one function: with matrices that lie otherwise, and with ``nn.Linear``; and their targets."""
    from transformers import AutoConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.pytorch_utils import Conv1D

    if kind == "Conv1D":
        model = nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(6, 12))
        twin = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
        for mine, other in zip(model[::2], twin[::2], strict=True):
            other.weight.data, other.bias.data = mine.weight.detach().T.clone(), mine.bias.detach().clone()
        given = (torch.randn(5, 8, dtype=torch.float64),)
        return model.double(), twin.double(), {"up": "0", "down": "2"}, {"up": "0", "down": "2"}, given
    config = AutoConfig.for_model("mixtral", hidden_size=8, intermediate_size=6, num_local_experts=4)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    index = torch.tensor([[0, 1], [1, 3], [3, 0]] * 5)  # none for expert 2
    given = (torch.randn(15, 8, dtype=torch.float64), index, torch.rand(15, 2, dtype=torch.float64))
    lists = {"gate_up": r"experts\.gate_up_proj", "down": r"experts\.down_proj"}
    linears = {name: rf"{pattern}\.\d" for name, pattern in lists.items()}
    model, twin = nn.ModuleDict({"experts": experts}), nn.ModuleDict({"experts": Linears(experts)})
    for module in (model, twin):
        module.forward = module.experts.forward
    return model, twin, lists, linears, given


@pytest.mark.parametrize("form", [*FORMS, "side"])
@pytest.mark.parametrize("kind", ["Conv1D", "experts"])
def test_bases_and_steps_are_those_of_separate_linears(kind, form):
    """And at least one entry of each moves, but those of an expert that no token has come to."""
    model, twin, lists, linears, given = twins(kind)
    options = {"form": "truncated", "update": "side"} if form == "side" else {"form": form}
    bases, found = None, []
    for one, patterns in ((model, lists), (twin, linears)):
        moments = collect_moments(one, [given] * 2, patterns, loss_fn=lambda m, batch: m(*batch).square().sum())
        bases = bases or {kind: hosvd(of_kind) for kind, of_kind in moments.items()}
        start = [t.matrix(t.weight).detach().clone() for t in find_targets(one, patterns)]
        sparsify(one, bases, 9, patterns, **options)
        optimizer = SparseGradAdamW(param_groups(one, weight_decay=0.1), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            one(*given).square().sum().backward()
            optimizer.step()
        y = one(*given).detach()
        merge(one)
        torch.testing.assert_close(one(*given).detach(), y, rtol=0, atol=1e-12)
        steps = [t.matrix(t.weight).detach() - old for t, old in zip(find_targets(one, patterns), start, strict=True)]
        found.append(([(m.count, m.left, m.right) for m in moments.values()], y, steps))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)
    still = [number for number, step in enumerate(found[0][2]) if step.abs().max() < 1e-6]
    assert still == ([2, 6] if kind == "experts" else [])


def test_experts_run_eager_until_they_are_merged():
    base, _, bases = built("mixtral")
    model = sparsify(copy.deepcopy(base), bases, 9, "all-mlp")
    experts = model.layers[1].mlp.experts
    assert model.config._experts_implementation == experts.config._experts_implementation == "eager"
    twin = copy.deepcopy(model)
    assert merge(twin).config._experts_implementation == "batched_mm"
    assert model.config._experts_implementation == "eager"
    with pytest.raises(TypeError, match=r"matmul reads the weights of experts; SparseGrad replaces those of F.linear"):
        torch.matmul(torch.zeros(2, 16), experts.gate_up_proj[0])
    assert type(twin.layers[0].mlp.experts.gate_up_proj) is nn.Parameter


def test_experts_that_are_frozen_stay_frozen():
    base, _, bases = built("mixtral")
    model = copy.deepcopy(base)
    model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    sparsify(model, bases, 9, "all-mlp")
    assert not any(layer.trained.requires_grad for layer in model.layers[0].mlp.experts.down_proj.layers)
    assert [p.requires_grad for p in merge(model).parameters()] == flags


def test_one_parameter_of_two_comes_back_to_its_place():
    base, batch, bases = built("mixtral")
    model = copy.deepcopy(base)
    sparsify(model, bases, 9, {"expert_gate_up": r"layers\.(?P<layer>\d+)\.mlp\.experts\.gate_up_proj"}, [1])
    assert len(sparsegrad_layers(model)) == 3 and type(model.layers[1].mlp.experts.down_proj) is nn.Parameter
    torch.testing.assert_close(output(model, batch), output(base, batch), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"holds SparseGrad layers already: merge\(model\) first"):
        sparsify(model, bases, 9, "all-mlp")
    assert [n for n, _ in merge(model).named_parameters()] == [n for n, _ in base.named_parameters()]


def test_experts_that_are_kept_transposed_are_refused():
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model("gpt_oss", **SIZES, num_local_experts=2))
    with pytest.raises(ValueError, match=r"GptOssExperts keeps its experts' weights as \(in_features, out_features\)"):
        sparsify(model, None, 9, ["experts.down_proj"])


def test_endings_find_experts_beside_linears():
    model, _, _ = built("qwen3_moe")
    kinds = {t.kind: t.shape for t in find_targets(model, ["down_proj"])}
    assert kinds == {"mlp_down_proj": (16, 24), "mlp_experts_down_proj": (16, 20)}
