"""From a plain model to SparseGrad layers and back: targets, refusals, functions that do not change."""

import copy
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from literal import assert_unchanged, snapshot
from torch import nn

from sparsegrad import (
    Basis,
    FoldedLinear,
    GradientMoments,
    RotatedLinear,
    SparseGradAdamW,
    TruncatedLinear,
    find_targets,
    hosvd,
    merge,
    param_groups,
    sparsegrad_layers,
    sparsify,
)

LAYERS = {"folded": FoldedLinear, "rotated": RotatedLinear, "truncated": TruncatedLinear}
FORMS = list(LAYERS)
FAMILIES = ["bert", "roberta", "llama"]
CONFS = {"bert_base": 12, "roberta_base": 12, "roberta_large": 24, "minilm": 6, "tiny_bert": 2, "tiny_roberta": 2}


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def loss(model, tokens):
    return torch.log_softmax(model(input_ids=tokens).logits, dim=-1)[..., 0].square().sum()


# ---- targets ----


@pytest.mark.parametrize(("name", "n_blocks"), CONFS.items())
def test_the_patterns_of_conf_take_exactly_the_mlp_matrices(name, n_blocks, hub_model, model_conf):
    """Two in each block, with the widths of an MLP; the attention's output.dense is not among them."""
    conf = model_conf(name)
    with torch.device("meta"):
        model = hub_model(name)
    width, inner = conf["architecture"]["hidden_size"], conf["architecture"]["intermediate_size"]
    targets = find_targets(model, conf["target_modules"], conf["layers_to_transform"])
    prefix = f"{conf['architecture']['model_type']}.encoder.layer"
    expected = [f"{prefix}.{i}.{part}.dense" for i in range(n_blocks) for part in ("intermediate", "output")]
    assert [t.name for t in targets] == expected
    assert [t.layer for t in targets] == [i for i in range(n_blocks) for _ in range(2)]
    shapes = {"up": (inner, width), "down": (width, inner)}
    assert all(tuple(t.module.weight.shape) == shapes[t.kind] for t in targets)
    assert all(model.get_submodule(t.name) is t.module for t in targets)


def test_llama_takes_up_and_down_of_the_blocks_divisible_by_three(hub_model, model_conf):
    conf = model_conf("llama2_7b")
    with torch.device("meta"):
        model = hub_model("llama2_7b")
    targets = find_targets(model, conf["target_modules"], conf["layers_to_transform"])
    expected = [f"model.layers.{i}.mlp.{part}_proj" for i in range(0, 32, 3) for part in ("up", "down")]
    assert sorted(t.name for t in targets) == sorted(expected) and len(targets) == 22
    assert sum(t.module.weight.numel() for t in targets) == 22 * 4096 * 11008
    assert len(find_targets(model, conf["target_modules"])) == 64


def test_a_pattern_without_the_group_has_no_block_index(blocks):
    assert [t.layer for t in find_targets(blocks(), {"up": r"layers\.\d+\.up"})] == [None, None]


@pytest.mark.parametrize(
    ("patterns", "blocks_to_take", "text"),
    [
        ({"up": "up"}, None, r"target_modules.up='up' matches no module in full. Linear layers .*: layers.0.up, "),
        (
            {"up": r"layers\.\d+\.(up|norm)"},
            None,
            r"must name linear layers, .*; these are not: layers.0.norm \(LayerN",
        ),
        ({"up": r"layers\.(\d+\.up"}, None, r"target_modules.up=.* is no regular expression: "),
        ({"up": None}, None, r"target_modules.up=None is no regular expression: "),
        ({}, None, r"target_modules=\{\}; give a dictionary of layer kinds and regular expressions, a list of names' "),
        ([], None, r"target_modules=\[\]; give a dictionary"),
        ("up", None, r"target_modules='up' matches no module in full. Linear layers .*: layers.0.up, "),
        (r"layers\.(\d+\.up", None, r"target_modules='layers.* is no regular expression: "),
        (["up", "p"], None, r"target_modules has 'p', the end of no layer's name. Linear layers .*: layers.0.up, "),
        (["up", 3], None, r"target_modules has 3, the end of no layer's name"),
        (r"layers\.\d+\.(up|down)|head", [2], r"names blocks \[2\]; the model has \[0, 1\]"),
        ("all-mlp", None, r"'all-mlp' knows no model of type None; known: albert, bert, .* Give a dictionary"),
        ({"up": r"layers\.(?P<layer>\d+)\.up"}, [True], r"layers_to_transform=\[True\]; blocks are whole numbers"),
        ({"up": r"layers\.(?P<layer>\d+)\.up"}, [0, 2, 5], r"names blocks \[2, 5\]; the model has \[0, 1\]"),
        ({"up": r"layers\.\d+\.up"}, [0], r"names blocks \[0\]; the model has no block index"),
        (
            {"up": r"layers\.(?P<layer>\d+)\.up", "down": r"layers\.\d+\.down"},
            [0],
            r"layers_to_transform=\[0\] leaves no layer of kind down: name blocks of that kind",
        ),
        ({"up": r"layers\.(?P<layer>\d+)\.up"}, [], r"layers_to_transform=\[\] leaves no layer of kind up"),
    ],
)
def test_targets_that_do_not_fit_are_refused(patterns, blocks_to_take, text, blocks):
    with pytest.raises(ValueError, match=text):
        find_targets(blocks(), patterns, blocks_to_take)


# ---- sparsify ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", ["hosvd", "released"])
def test_sparsify_leaves_the_function_unchanged(family, form, orientation, tiny_transformer, transformer_bases):
    model, patterns, tokens = tiny_transformer(family)
    before, names = logits(model, tokens), [t.name for t in find_targets(model, patterns)]
    bases = {kind: basis.oriented(orientation) for kind, basis in transformer_bases().items()}
    assert sparsify(model, bases, 5, patterns, form=form) is model
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=1e-10)
    layers = sparsegrad_layers(model)
    assert list(layers) == names
    assert {type(layer) for layer in layers.values()} == {LAYERS[form]}


def test_an_option_of_another_form_may_stand_at_its_default(blocks, block_bases, block_patterns):
    every = {"select_in": "step", "matmul": "regular", "ranks": None, "keep": None, "update": None}
    for form in FORMS:
        sparsify(blocks(), block_bases(), 5, block_patterns, form=form, **every)


def test_options_reach_the_layers(blocks, block_bases, block_patterns):
    options = {"form": "rotated", "matmul": "sparse_by_dense", "select_in": "backward"}
    model = sparsify(blocks(), block_bases(), {"up": 3, "down": 4}, block_patterns, [1], **options)
    layers = sparsegrad_layers(model)
    assert {name: layer.k for name, layer in layers.items()} == {"layers.1.up": 3, "layers.1.down": 4}
    assert {(layer.matmul, layer.select_in) for layer in layers.values()} == {("sparse_by_dense", "backward")}
    assert type(model.layers[0].up) is nn.Linear


@pytest.mark.parametrize("form", FORMS)
def test_layers_of_a_kind_share_one_basis_which_is_a_copy(form, blocks, block_bases, block_patterns):
    """After casts and deepcopy too."""
    bases = block_bases()
    model = sparsify(blocks(n=3, dtype=torch.float32), bases, 5, block_patterns, form=form)
    assert bases["up"].U.dtype == torch.float64 and model.layers[0].up.basis.U.dtype == torch.float32
    moves = (model.float, model.double, model.bfloat16, lambda: copy.deepcopy(model), lambda: model.to("meta"))
    for move in moves:
        layers = move().layers
        shared = [{id(getattr(block, kind).basis) for block in layers} for kind in ("up", "down")]
        assert [len(s) for s in shared] == [1, 1] and len(set.union(*shared, map(id, bases.values()))) == 4
    U = sparsify(blocks(), bases, 5, block_patterns, form=form).layers[0].up.basis.U
    assert U.data_ptr() != bases["up"].U.data_ptr() and U.untyped_storage().nbytes() == U.numel() * 8  # no view


@pytest.mark.parametrize("form", FORMS)
def test_sparsify_keeps_modes_and_what_is_frozen(form, blocks, block_bases, block_patterns):
    model = blocks().eval()
    model.layers[0].train()
    model.layers[0].up.weight.requires_grad_(False)
    model.layers[0].up.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    sparsify(model, block_bases(), 5, block_patterns, form=form)
    now = {name: p.requires_grad for name, p in model.named_parameters()}
    trained = {f"{name}.weight": layer.trained.requires_grad for name, layer in sparsegrad_layers(model).items()}
    assert {name: (now | trained)[name] for name in flags} == flags
    assert {name: m.training for name, m in model.named_modules() if name in modes} == modes
    merge(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes


REFUSALS = [
    ({"form": "diagonal"}, r"form='diagonal'; allowed: folded, rotated, truncated"),
    ({"matmul": "sparse_by_dense"}, r"matmul='sparse_by_dense' is no option of form='folded', which takes select_in"),
    ({"matmul": "sparse_by_dense", "form": "truncated"}, r"no option of form='truncated', which takes ranks, keep, up"),
    ({"form": "truncated", "select_in": "backward"}, r"select_in='backward' is no option of form='truncated'"),
    ({"density": 0.1, "form": "rotated"}, r"density=0.1 is no option of form='rotated', which takes select_in, matmul"),
    ({"form": "truncated", "select": lambda G, k: None}, r"layers.0.up: keep=None trains the whole core: give keep"),
    ({"form": "truncated", "bases": None}, r"layers.0.up: form 'truncated' .* so it needs a basis"),
    ({"form": "truncated", "ranks": {"up": (2, 2)}}, r"no ranks for layer kind 'down'; given: up"),
    ({"form": "truncated", "keep": {"down": 2}}, r"no keep for layer kind 'up'; given: down"),
    ({"form": "truncated", "ranks": (9, 9)}, r"layers.0.up: ranks=\(9, 9\); this basis allows .* to \(12, 8\)"),
    ({"form": "truncated", "ranks": (3, 2)}, r"layers.0.up: ranks=\(3, 2\) are 6 entries, more than k=5"),
    ({"form": "truncated", "keep": 5}, r"layers.0.up: k=5; a matrix of shape \(2, 2\) allows .* 1 to 4"),
    ({"form": "truncated", "update": "later"}, r"layers.0.up: update='later'; allowed: in_place, side"),
    ({"form": "rotated", "matmul": "dense"}, r"layers.0.up: matmul='dense'; allowed: regular, sparse_by_dense"),
    ({"select_in": "forward"}, r"layers.0.up: select_in='forward'; allowed: step, backward"),
    ({"k": 97}, r"layers.0.up: k=97; a matrix of shape \(12, 8\) allows whole numbers from 1 to 96"),
    ({"k": 0.01}, r"layers.0.up: k=0.01; .* whole numbers from 1 to 96"),
    ({"k": {"up": 5, "down": 97}}, r"layers.0.down: k=97; a matrix of shape \(8, 12\)"),
    ({"k": {"up": 5}}, r"layers.0.down: no k for layer kind 'down'; given: up"),
    ({"target_modules": {"up": "nothing"}}, r"target_modules.up='nothing' matches no module in full"),
    ({"bases": "up only"}, r"no basis for layer kind 'down'; given: up"),
    (
        {"bases": "moments"},
        r"layers.0.up: bases\['up'\] is a GradientMoments; give a Basis, hosvd of",
    ),
    ({"bases": Path("bases.safetensors")}, r"layers.0.up: bases is a .*Path; give a mapping, .* load_bases\(path\)"),
    ({"bases": "swapped"}, r"layers.0.up: the basis is for weights of shape \(8, 12\), this weight has \(12, 8\)"),
    ({"bases": "truncated", "form": "rotated"}, r"layers.0.up: form 'rotated' keeps .* this one is truncated"),
    ({"bases": "skewed"}, r"layers.0.down: the basis is off orthogonality by .*e-02: its rows must be orthonormal"),
    ({"bases": "rounded"}, r"layers.0.up: the basis is off orthogonality by .*not rounded below float32"),
    ({"k": None}, r"layers.0.up: k=None; .* whole numbers from 1 to 96"),
    ({"bases": "truncated", "k": 10}, r"layers.0.up: k=10; a matrix of shape \(3, 3\)"),
]


@pytest.mark.parametrize(("wrong", "text"), REFUSALS, ids=[text[:40] for _, text in REFUSALS])
def test_a_refusal_says_why_and_leaves_the_model_unchanged(wrong, text, blocks, block_bases, block_patterns):
    model, good = blocks(), block_bases()
    moments = GradientMoments(12, 8)
    moments.update(torch.randn(12, 8))
    named = {
        "up only": {"up": good["up"]},
        "moments": {"up": moments, "down": moments},
        "swapped": {"up": good["down"], "down": good["up"]},
        "truncated": {"up": hosvd(moments, rank=3), "down": good["down"]},
        "skewed": {"up": good["up"], "down": Basis(1.01 * good["down"].U, good["down"].V)},
        "rounded": {kind: Basis(basis.U.bfloat16(), basis.V.bfloat16()) for kind, basis in good.items()},
    }
    arguments = {"bases": good, "k": 5, "target_modules": block_patterns} | wrong
    if isinstance(arguments["bases"], str):
        arguments["bases"] = named[arguments["bases"]]
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        sparsify(model, **arguments)
    assert_unchanged(model, before)


ANY = st.none() | st.booleans() | st.integers(-2, 100) | st.floats() | st.just("x")
PAIRS = st.none() | st.lists(st.integers(-1, 13), max_size=3)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    form=st.sampled_from(FORMS), k=ANY, keep=ANY, ranks=PAIRS, which=PAIRS, select_in=st.sampled_from(["step", "x"])
)
def test_any_arguments_give_a_model_or_a_refusal(
    form, k, keep, ranks, which, select_in, blocks, block_bases, block_patterns
):
    """Of a refusal, one line, and the model as it was."""
    model, x = blocks(), torch.randn(3, 8, dtype=torch.float64)
    before, y = snapshot(model), model(x)
    options = {"keep": keep, "ranks": ranks} if form == "truncated" else {}
    try:
        sparsify(model, block_bases(), k, block_patterns, which, form=form, select_in=select_in, **options)
    except ValueError as error:
        assert "\n" not in str(error)
        assert_unchanged(model, before)
    else:
        torch.testing.assert_close(model(x), y)
        assert sparsegrad_layers(model) and type(k) is int


def test_a_sparsified_model_is_refused_until_it_is_merged(blocks, block_bases, block_patterns):
    plain = blocks()
    before = snapshot(plain)
    assert_unchanged(merge(plain), before)
    model = sparsify(plain, block_bases(), 5, block_patterns)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"holds SparseGrad layers already: merge\(model\) first"):
        sparsify(model, block_bases(), 5, block_patterns)
    assert_unchanged(model, before)
    sparsify(merge(model), block_bases(1), 5, block_patterns, form="rotated")
    assert len(sparsegrad_layers(model)) == 4


# ---- merge ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_merge_gives_a_plain_model_that_saves_and_loads(family, form, tiny_transformer, transformer_bases, tmp_path):
    model, patterns, tokens = tiny_transformer(family)
    plain_types = {name: type(module) for name, module in model.named_modules()}
    plain_shapes = {name: t.shape for name, t in model.state_dict().items()}
    base = logits(model, tokens)
    sparsify(model, transformer_bases(), 20, patterns, form=form)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, tokens).backward()
        optimizer.step()
    trained = logits(model, tokens)
    assert (trained - base).abs().max() > 1e-4

    assert merge(model) is model and not sparsegrad_layers(model)
    assert {name: type(module) for name, module in model.named_modules()} == plain_types
    assert all(type(t.module) is nn.Linear for t in find_targets(model, patterns))
    assert {name: t.shape for name, t in model.state_dict().items()} == plain_shapes
    torch.testing.assert_close(logits(model, tokens), trained, rtol=0, atol=1e-10)

    model.float().save_pretrained(tmp_path)  # LLaMa's rotary frequencies are made in float32, so compare there
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


# ---- moving and copying ----


@pytest.mark.parametrize("form", FORMS)
def test_a_deepcopy_trains_apart_from_its_original(form, blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 5, block_patterns, form=form)
    twin, before = copy.deepcopy(model), snapshot(model)
    assert twin.layers[0].up.basis is not model.layers[0].up.basis
    optimizer = SparseGradAdamW(param_groups(twin), lr=1e-2)
    twin(torch.randn(4, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert_unchanged(model, before)
    assert not torch.equal(twin.layers[0].up.weight, model.layers[0].up.weight)


# ---- what models do with their layers ----


def step(model, x):
    optimizer = SparseGradAdamW(param_groups(model), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_under_two_names_stays_one_layer(form, blocks, block_bases, block_patterns):
    """Blocks that share an MLP, and a whole block that is used twice."""
    model = blocks(n=3)
    model.layers[1].up, model.layers[2] = model.layers[0].up, model.layers[0]
    x = torch.randn(4, 8, dtype=torch.float64)
    before = model(x).detach()
    sparsify(model, block_bases(), 9, block_patterns, form=form)
    assert model.layers[1].up is model.layers[0].up and model.layers[2] is model.layers[0]
    assert isinstance(model.layers[1].up, LAYERS[form]) and len(sparsegrad_layers(model)) == 3
    step(model, x)
    trained = model(x).detach()
    assert (trained - before).abs().max() > 1e-3
    merge(model)
    assert type(model.layers[1].up) is nn.Linear and model.layers[1].up is model.layers[0].up
    torch.testing.assert_close(model(x).detach(), trained, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_tied_parameters_are_refused_by_their_names(form, name, blocks, block_bases, block_patterns):
    model = blocks()
    setattr(model.layers[1].up, name, getattr(model.layers[0].up, name))
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"layers\.0\.up\.{name} and layers\.1\.up\.{name} are tied"):
        sparsify(model, block_bases(), 9, block_patterns, form=form)
    assert_unchanged(model, before)


def test_an_output_layer_that_is_tied_to_the_embedding_is_refused(tiny_transformer, random_basis):
    model, _, _ = tiny_transformer("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight and lm_head\.weight are tied"):
        sparsify(model, {"head": random_basis(50, 16)}, 9, {"head": "lm_head"})
    sparsify(model, None, 9, {"up": r"model\.layers\.\d+\.mlp\.up_proj"})


ENCODER = {"up": r".*layers\.(?P<layer>\d+)\.linear1", "down": r".*layers\.(?P<layer>\d+)\.linear2"}


@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize(("form", "options"), [("folded", {}), ("rotated", {}), ("truncated", {"update": "side"})])
def test_torchs_encoder_calls_the_layers_when_it_keeps_no_gradients(form, options, padded, block_bases):
    """Its fast path reads weights; where none of its layers is ours, it is taken again."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2).double()
    x, mask = torch.randn(3, 5, 8, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 3:] = padded
    given = {"src_key_padding_mask": mask} if padded else {}
    sparsify(encoder, block_bases(), 9, ENCODER, form=form, **options)
    optimizer = SparseGradAdamW(param_groups(encoder), lr=0.1)
    encoder(x, **given).square().sum().backward()
    optimizer.step()
    encoder.eval()
    calls = []
    layer = encoder.layers[1].linear1
    layer.register_forward_hook(lambda *_: calls.append(1))
    with_gradients = encoder(x, **given)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, **given)[~mask], with_gradients[~mask])
    assert len(calls) == 2
    merge(encoder)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize("form", FORMS)
def test_attention_that_reads_the_weight_of_its_output_layer(form, random_basis):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    model, x = nn.ModuleDict({"attention": attention}), torch.randn(2, 4, 8, dtype=torch.float64)
    before = attention(x, x, x)[0].detach()
    arguments = ({"out": random_basis(8, 8)}, 9, {"out": r"attention\.out_proj"})
    if form != "folded":
        with pytest.raises(ValueError, match=r"out_proj: nn.MultiheadAttention reads its weight itself: use form='fol"):
            sparsify(model, *arguments, form=form)
        return
    sparsify(model, *arguments)
    torch.testing.assert_close(attention(x, x, x)[0], before)
    optimizer, start = SparseGradAdamW(param_groups(model), lr=0.1), attention.out_proj.rotated_weight().clone()
    attention(x, x, x)[0].square().sum().backward()
    optimizer.step()
    assert ((attention.out_proj.rotated_weight() - start).abs() > 1e-6).sum() == 9


@pytest.mark.parametrize("frozen", [["layers.0.up"], ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]])
@pytest.mark.parametrize("form", FORMS)
def test_layers_that_were_frozen_before_are_noticed_when_training_begins(
    form, frozen, blocks, block_bases, block_patterns
):
    model = blocks()
    for name in frozen:
        model.get_submodule(name).weight.requires_grad_(False)
    sparsify(model, block_bases(), 9, block_patterns, form=form)
    with pytest.raises(ValueError, match=rf"{len(frozen)} of 4 SparseGrad layers are frozen \({frozen[0]}"):
        param_groups(model)
    merge(model)


def test_weights_that_were_replaced_are_noticed_when_training_begins(blocks, block_bases, block_patterns):
    """As sharding does it, and loading by assignment."""
    model = sparsify(blocks(), block_bases(), 9, block_patterns)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    model.layers[1].down.weight = nn.Parameter(model.layers[1].down.weight.detach())
    with pytest.raises(ValueError, match=r"the weights of .*layers\.1\.down are no longer .* FSDP and DeepSpeed"):
        param_groups(model)


def test_weights_that_were_replaced_in_the_optimizer_are_not_stepped(blocks, block_bases, block_patterns):
    """As DeepSpeed and accelerate's FSDP do it; what stands there would be trained in full."""
    model = sparsify(blocks(), block_bases(), 9, block_patterns)
    optimizer = SparseGradAdamW(param_groups(model))
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in optimizer.param_groups[1]["params"]]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[1]["params"] = [flat]
    with pytest.raises(ValueError, match=r"the weights of group 1 are no longer .* FSDP and DeepSpeed"):
        optimizer.step()
    assert torch.equal(flat[:96].view(12, 8), model.layers[0].up.weight)


# ---- states ----


@pytest.mark.parametrize("form", FORMS)
def test_a_state_holds_every_basis_once_and_loads_into_a_model_with_others(form, blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 9, block_patterns, form=form)
    state = model.state_dict()
    assert sum(name.endswith(".U") for name in state) == 2
    pointers = [t.untyped_storage().data_ptr() for t in state.values() if t.numel()]
    assert len(pointers) == len(set(pointers))
    other = sparsify(blocks(seed=1), block_bases(1), 9, block_patterns, form=form)
    other.load_state_dict(state)
    for block in other.layers:
        assert torch.equal(block.up.basis.U, model.layers[0].up.basis.U)
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x))


def test_a_borrowed_basis_goes_where_its_layer_goes(blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 9, block_patterns)
    layer = model.layers[1].up
    layer.to("meta")
    assert layer.basis.U.is_meta and layer.weight.is_meta
