"""The optimizer against torch.optim.AdamW, SparseAdam and Adam; its state; its groups; clipping."""

import copy
import io

import literal
import pytest
import torch
from literal import IN, OUT, K, train
from torch import nn

from sparsegrad import (
    FoldedLinear,
    RotatedLinear,
    SparseGradAdamW,
    clip_grad_norm_,
    param_groups,
    sparsegrad_layers,
    sparsify,
    top_k,
)

FORMS = [FoldedLinear, RotatedLinear]
by_fused = pytest.mark.parametrize("fused", [False, True], ids=["default", "fused"])


def written_out(indices, values, shape):
    return torch.zeros(shape, dtype=values.dtype).view(-1).index_copy_(0, indices, values).view(shape)


def gradients(n, *shape, seed=0, dtype=torch.float64):
    """Gradients that grow and shrink by orders of magnitude, so that the moments matter."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(n, 1, 1, generator=generator, dtype=torch.float64))
    return (torch.randn(n, *shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def give_gradient(layer, basis, G_rot):
    """Put a dense gradient into the layer whose rotated form is G_rot."""
    layer.weight.grad = G_rot.clone() if isinstance(layer, RotatedLinear) else basis.rotate_back(G_rot)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for index, state in one.items():
        assert state.keys() == other[index].keys()
        assert all(torch.equal(tensor, other[index][key]) for key, tensor in state.items())


# ---- against torch.optim ----


def test_the_kernel_is_torchs_choice_unless_fused_is_asked_for(monkeypatch):
    """foreach=None and fused=None together let torch take the foreach kernel on CUDA; fused=False would not."""
    parameter, asked = nn.Parameter(torch.ones(2)), []
    monkeypatch.setattr("sparsegrad.optim.adamw", lambda *a, foreach, fused, **k: asked.append((foreach, fused)))
    for fused in (False, True):
        parameter.grad = torch.ones(2)
        SparseGradAdamW([{"params": [parameter]}], fused=fused).step()
    assert asked == [(None, None), (False, True)]


@by_fused
def test_dense_groups_equal_torch_adamw_bit_for_bit(fused):
    """Two groups of other lr, betas, eps and decay; a parameter without a gradient is left alone at that step."""
    values = [torch.randn(4, 3) for _ in range(3)]
    groups = [{"lr": 1e-2, "weight_decay": 0.3}, {"lr": 1e-3, "betas": (0.5, 0.6), "eps": 1e-3}]

    def build(optimizer_class):
        parameters = [nn.Parameter(v.clone()) for v in values]
        own = [{"params": parameters[:2], **groups[0]}, {"params": parameters[2], **groups[1]}]
        return parameters, optimizer_class(own, lr=1.0, weight_decay=0.05, fused=fused)

    (mine, optimizer), (theirs, adamw) = build(SparseGradAdamW), build(torch.optim.AdamW)
    for i, gradient in enumerate(gradients(6, 4, 3, dtype=torch.float32)):
        for parameters, opt in ((mine, optimizer), (theirs, adamw)):
            for p in parameters:
                p.grad = gradient.clone()
            if i % 2:
                parameters[0].grad = None
            opt.step()
    for p, q, start in zip(mine, theirs, values, strict=True):
        assert torch.equal(p, q) and not torch.equal(p, start)


@pytest.mark.parametrize("layer_class", FORMS)
def test_kept_entries_equal_sparse_adam(layer_class, random_basis):
    """SparseAdam on a dense copy of W_rot, driven by the same COO gradients; some steps have no gradient."""
    basis, weight = random_basis(OUT, IN), torch.randn(OUT, IN, dtype=torch.float64)
    layer = layer_class(weight, None, basis, K)
    W_rot = (basis.V @ weight @ basis.U.T).requires_grad_()
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-5}
    optimizer = SparseGradAdamW(param_groups(layer), **options)
    sparse_adam = torch.optim.SparseAdam([W_rot], **options)
    for i, G_rot in enumerate(gradients(20, OUT, IN)):
        for opt in (optimizer, sparse_adam):
            opt.zero_grad()
            opt.param_groups[0]["lr"] = 0.05 / (1 + i)  # as a scheduler would
        if i % 5 != 3:
            give_gradient(layer, basis, G_rot)
            indices = literal.top_k(G_rot, K)
            W_rot.grad = literal.coo(indices, G_rot.flatten()[indices], G_rot.shape)
        optimizer.step()
        sparse_adam.step()
        torch.testing.assert_close(layer.rotated_weight(), W_rot.detach(), rtol=0, atol=1e-12)


def test_a_closure_is_run_with_gradients_and_its_loss_returned(blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 5, block_patterns)
    optimizer, x = SparseGradAdamW(param_groups(model), lr=1e-2), torch.randn(4, 8, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]


# ---- state ----


@pytest.mark.parametrize("layer_class", FORMS)
def test_state_is_as_large_as_the_entries_touched(layer_class, random_basis):
    """SparseAdam's moments are dense (D9)."""
    basis = random_basis(OUT, IN)
    layer = layer_class(torch.randn(OUT, IN, dtype=torch.float64), None, basis, 4)
    optimizer = SparseGradAdamW(param_groups(layer))
    assert len(optimizer.touched(layer)) == 0 and optimizer.touched(layer).dtype == torch.int64
    kept = set()
    for i, G_rot in enumerate(gradients(6, OUT, IN), start=1):
        give_gradient(layer, basis, G_rot)
        kept |= set(literal.top_k(G_rot, 4).tolist())
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        assert optimizer.touched(layer).tolist() == sorted(kept) and state["step"] == i
        assert optimizer.moment_bytes() == len(kept) * (8 + 2 * 8)
    assert 4 < len(kept) < OUT * IN


SELECTING = [{"form": f, "select_in": s} for f in ("folded", "rotated") for s in ("step", "backward")]
CORES = [{"form": "truncated", "update": u, "keep": k} for u in ("in_place", "side") for k in (None, 4)]


def of_form(options):
    return "-".join(map(str, options.values()))


@pytest.mark.parametrize(
    ("options", "precision"),
    [(o, p) for o in SELECTING for p in ("float32", "bfloat16", "cast to bfloat16 after sparsify")]
    + [(o, "float32") for o in CORES],
    ids=lambda value: of_form(value) if isinstance(value, dict) else value,
)
@by_fused
def test_a_state_dict_in_the_middle_of_training_continues_bit_for_bit(
    options, precision, fused, blocks, block_bases, block_patterns
):
    dtype = torch.float32 if precision == "float32" else torch.bfloat16

    def build(seed):
        model = blocks(dtype=dtype if precision == "bfloat16" else torch.float32, seed=seed)
        model = sparsify(model, block_bases(seed), 9, block_patterns, **options).to(dtype)
        return model, SparseGradAdamW(param_groups(model, weight_decay=0.1), lr=1e-2, fused=fused)

    whole, whole_optimizer = build(0)
    train(whole, whole_optimizer, range(10), dtype, clip_grad_norm_)

    first, first_optimizer = build(0)
    train(first, first_optimizer, range(5), dtype, clip_grad_norm_)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": first_optimizer.state_dict()}, file)
    train(first, first_optimizer, range(5, 8), dtype, clip_grad_norm_)  # what was saved is not tied to what goes on
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, second_optimizer = build(1)
    second.load_state_dict(saved["model"])
    second_optimizer.load_state_dict(saved["optimizer"])
    before = copy.deepcopy(saved["optimizer"]["state"])
    for layer in sparsegrad_layers(second).values():
        assert second_optimizer.touched(layer).dtype == torch.int64
        state = second_optimizer.state_dict()["state"]
        assert {own[name].dtype for own in state.values() for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    train(second, second_optimizer, range(5, 10), dtype, clip_grad_norm_)

    expected, found = whole.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    for name in expected.keys() - {f"{name}.moved" for name in sparsegrad_layers(second)}:  # told from another base
        assert torch.equal(found[name], expected[name]), name
    assert_same_state(whole_optimizer.state_dict()["state"], second_optimizer.state_dict()["state"])
    assert_same_state(saved["optimizer"]["state"], before)  # what was loaded is a copy


def test_learning_rates_come_back_with_the_state(blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 5, block_patterns)
    optimizer = SparseGradAdamW(param_groups(model), lr=0.5, betas=(0.1, 0.2))
    other = SparseGradAdamW(param_groups(model), lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    assert [(g["lr"], g["betas"]) for g in other.param_groups] == [(0.5, (0.1, 0.2))] * 2
    assert [g["sparsegrad"] for g in other.param_groups] == [False, True]
    larger = SparseGradAdamW(param_groups(sparsify(blocks(n=3), block_bases(), 5, block_patterns)))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(larger.state_dict())


def test_dense_bfloat16_parameters_step_a_float32_master():
    """20 steps that are each smaller than bfloat16's spacing add up; torch's AdamW, the control, stands still."""
    mine, theirs = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    exact = nn.Parameter(torch.ones(4))
    optimizer = SparseGradAdamW([{"params": [mine]}], lr=1e-3)
    others = [torch.optim.AdamW([p], lr=1e-3, weight_decay=0) for p in (theirs, exact)]
    for _ in range(20):
        for p in (mine, theirs, exact):
            p.grad = torch.ones_like(p)
        for opt in (optimizer, *others):
            opt.step()
    state = optimizer.state[mine]
    assert {state[key].dtype for key in ("master", "exp_avg", "exp_avg_sq")} == {torch.float32}
    assert torch.equal(state["master"], exact)
    assert torch.equal(mine, exact.bfloat16()) and (theirs == 1).all()


# ---- gradients that are held in compact form ----


@pytest.mark.parametrize("options", SELECTING + CORES, ids=of_form)
def test_zero_grad_forgets_compact_gradients_too(options, blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 9, block_patterns, **options)
    optimizer, before = SparseGradAdamW(param_groups(model)), literal.snapshot(model)
    for _ in range(2):  # a second pass is welcome after it
        model(torch.randn(4, 8, dtype=torch.float64)).sum().backward()
        clip_grad_norm_(model, 1.0)
        optimizer.zero_grad()
    optimizer.step()
    literal.assert_unchanged(model, before)
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("form", ["folded", "rotated"])
@pytest.mark.parametrize("select_in", ["step", "backward"])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_equals_torchs_on_gradients_written_out_densely(
    form, select_in, max_norm, blocks, block_bases, block_patterns
):
    x, bases = torch.randn(6, 8, dtype=torch.float64), block_bases()
    reference = blocks()
    reference(x).square().sum().backward()
    for name, module in reference.named_modules():
        kind = name.rsplit(".")[-1]
        if kind in bases:
            G_rot = bases[kind].V @ module.weight.grad @ bases[kind].U.T
            keep = literal.top_k(G_rot, 5)
            module.weight.grad = written_out(keep, G_rot.flatten()[keep], G_rot.shape)
    expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)

    model = sparsify(blocks(), bases, 5, block_patterns, form=form, select_in=select_in)
    model(x).square().sum().backward()
    norm = clip_grad_norm_(model, max_norm)
    torch.testing.assert_close(norm, expected_norm)
    assert float(clip_grad_norm_(model, 1e9)) == pytest.approx(min(float(norm), max_norm), rel=1e-5)
    dense_copy = dict(reference.named_parameters())
    layers = sparsegrad_layers(model)
    for name, layer in layers.items():
        dense = written_out(*layer.take_gradient(), layer.weight.shape)
        torch.testing.assert_close(dense, dense_copy.pop(f"{name}.weight").grad)
    assert set(dense_copy) == {n for n, _ in model.named_parameters()} - {f"{n}.weight" for n in layers}
    for name, parameter in dense_copy.items():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


def test_clipping_without_any_gradient_is_zero(blocks, block_bases, block_patterns):
    assert clip_grad_norm_(sparsify(blocks(), block_bases(), 5, block_patterns), 1.0) == 0


@pytest.mark.parametrize("options", [*SELECTING[::2], *CORES[:2]], ids=of_form)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_moves(
    options, bad, blocks, block_bases, block_patterns
):
    model = sparsify(blocks(), block_bases(), 9, block_patterns, **options)
    optimizer, before = SparseGradAdamW(param_groups(model)), literal.snapshot(model)
    for act in (optimizer.step, lambda: clip_grad_norm_(model, 1.0)):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        model.layers[1].down.trained.grad[1, 2] = bad
        with pytest.raises(
            ValueError, match=r"gradient of layers\.1\.down holds non-finite values: lower the learning"
        ):
            act()
        optimizer.zero_grad()
    literal.assert_unchanged(model, before)
    assert not optimizer.state_dict()["state"]


# ---- groups ----


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("form", ["folded", "rotated", "truncated"])
def test_every_trainable_parameter_is_in_exactly_one_group(family, form, tiny_transformer, transformer_bases):
    """D8: LayerNorm and biases included; what is frozen is in none."""
    model, patterns, _ = tiny_transformer(family)
    sparsify(model, transformer_bases(), 5, patterns, form=form)
    frozen = next(p for name, p in model.named_parameters() if "embed" in name).requires_grad_(False)
    dense, sparse = param_groups(model, weight_decay=0.1)
    assert dense["weight_decay"] == 0.1 and "weight_decay" not in sparse
    grouped = [id(p) for group in (dense, sparse) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    assert id(frozen) not in grouped
    in_dense = {id(p) for p in dense["params"]}
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert norms and all(id(p) in in_dense for norm in norms for p in norm.parameters())
    layers = sparsegrad_layers(model)
    assert {id(p) for p in sparse["params"]} == {id(layer.trained) for layer in layers.values()}
    assert all(layer.bias is None or id(layer.bias) in in_dense for layer in layers.values())
    assert sparse["layers"] == list(layers.values())


def test_d8_the_layer_norms_of_bert_base_are_38400_trained_parameters(hub_model, model_conf):
    """The number of parameters that the released code leaves in no optimizer."""
    with torch.device("meta"):
        model = hub_model("bert_base")
    sparsify(model, None, 28_000, model_conf("bert_base")["target_modules"])
    dense, sparse = param_groups(model)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    assert sum(p.numel() for p in dense["params"] if id(p) in norms) == 38_400
    assert len(sparse["params"]) == 24 and sum(p.numel() for p in sparse["params"]) == 24 * 768 * 3072


@by_fused
def test_a_step_without_any_gradient_changes_nothing(fused, blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 5, block_patterns)
    before, optimizer = literal.snapshot(model), SparseGradAdamW(param_groups(model), fused=fused)
    optimizer.step()
    literal.assert_unchanged(model, before)
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, r"lr=-1.0, eps=1e-08, weight_decay=0.0; each must be finite, none negative"),
        ({"eps": -1e-8}, r"eps=-1e-08.*none negative"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1; each must be finite"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"eps": float("inf")}, "eps=inf"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\); each must lie in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas=\(-0.1, 0.9\)"),
        *(({"drop_after": bad}, f"drop_after={bad}") for bad in (0, -1, True, 2.5)),
    ],
)
def test_refuses_hyper_parameters_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        SparseGradAdamW([{"params": [nn.Parameter(torch.ones(2))]}], **options)


def test_refuses_weight_decay_on_a_sparsegrad_group(random_basis):
    layer = FoldedLinear(torch.randn(OUT, IN), None, random_basis(OUT, IN, dtype=torch.float32), K)
    (group,) = param_groups(layer)
    with pytest.raises(ValueError, match="lazy Adam has no weight decay: give weight_decay to the dense groups only"):
        SparseGradAdamW([group | {"weight_decay": 0.1}])
    layer.weight.grad = torch.randn(OUT, IN)
    optimizer = SparseGradAdamW([group], lr=0.0, weight_decay=0.1)  # the default is for dense groups
    assert optimizer.param_groups[0]["weight_decay"] == 0


def test_refuses_layers_that_are_not_those_of_the_parameters(random_basis):
    one, other = (
        FoldedLinear(torch.randn(OUT, IN), None, random_basis(OUT, IN, dtype=torch.float32), K) for _ in range(2)
    )
    for layers in ([other], [one, other], [other, one]):
        with pytest.raises(ValueError, match="needs 'layers': one for each of its parameters, in the same order"):
            SparseGradAdamW([{"params": [one.weight], "layers": layers}])
    with pytest.raises(ValueError, match="param_groups"):
        SparseGradAdamW(one.parameters())


# ---- CUDA ----


@pytest.mark.cuda
@by_fused
@pytest.mark.parametrize("options", [*SELECTING[::2], *CORES], ids=of_form)
def test_a_state_from_the_cpu_continues_on_cuda(options, fused, blocks, block_bases, block_patterns):
    """The step counters go where the kernel wants them; indices and moments go where the weight is."""

    def build(seed, device):
        model = sparsify(blocks(seed=seed), block_bases(seed), 9, block_patterns, **options).to(device)
        return model, SparseGradAdamW(param_groups(model), lr=1e-2, fused=fused)

    (model, optimizer), (on_cuda, cuda_optimizer) = build(0, "cpu"), build(1, "cuda")
    train(model, optimizer, range(3))
    on_cuda.load_state_dict(model.state_dict())
    cuda_optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(on_cuda, cuda_optimizer, range(3, 6))
    for p, q in zip(model.parameters(), on_cuda.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=0, atol=1e-10)
    for layer in sparsegrad_layers(on_cuda).values():
        state = cuda_optimizer.state[layer.trained]
        assert all(state[key].is_cuda for key in ("indices", "exp_avg", "exp_avg_sq") if key in state)


# ---- dropping stale entries ----


def literal_lazy_adam(gradients, lr, drop_after):
    """Dense moments, moved where a gradient holds an entry, zero again where none did for ``drop_after`` steps."""
    m, v, W = (torch.zeros(gradients[0].shape, dtype=torch.float64) for _ in range(3))
    last = torch.full(m.shape, -(10**6))
    for step, G in enumerate(gradients, 1):
        stale = last < step - drop_after
        m[stale], v[stale] = 0, 0
        kept = G != 0
        last[kept] = step
        m[kept] += 0.1 * (G - m)[kept]
        v[kept] += 0.001 * (G * G - v)[kept]
        size = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        W[kept] -= size * m[kept] / (v[kept].sqrt() + 1e-8)
    return W, last >= len(gradients) - drop_after


@pytest.mark.parametrize("drop_after", [1, 2, 5])
def test_entries_that_were_not_selected_for_n_steps_lose_their_state(drop_after):
    generator = torch.Generator().manual_seed(2)
    linear = nn.Linear(6, 5, bias=False).double()
    nn.init.zeros_(linear.weight)
    layer = FoldedLinear(linear.weight, None, None, 6)
    optimizer = SparseGradAdamW(param_groups(nn.ModuleList([layer])), lr=0.1, drop_after=drop_after)
    kept = []
    for _ in range(14):
        G = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        G = torch.zeros_like(G).flatten().index_copy_(0, top_k(G, 6), G.flatten()[top_k(G, 6)]).view_as(G)
        kept.append(G)
        layer.weight.grad = G.clone()
        optimizer.step()
    W, held = literal_lazy_adam(kept, 0.1, drop_after)
    torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-12, atol=1e-12)
    assert torch.equal(optimizer.touched(layer), held.flatten().nonzero().flatten()) and len(held.nonzero()) < 30


def test_dropping_continues_from_a_state_bit_for_bit_and_may_begin_in_the_middle():
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(5, 6, generator=generator) for _ in range(12)]

    def run(steps, drop_after, state=None, weight=None):
        layer = FoldedLinear(torch.zeros(5, 6) if weight is None else weight, None, None, 6)
        optimizer = SparseGradAdamW(param_groups(nn.ModuleList([layer])), lr=0.1, drop_after=drop_after)
        if state is not None:
            optimizer.load_state_dict(state)
        for G in gradients[steps]:
            layer.weight.grad = G.clone()
            optimizer.step()
        return layer, optimizer

    whole, _ = run(slice(0, 12), 2)
    first, optimizer = run(slice(0, 6), 2)
    second, _ = run(slice(6, 12), 2, optimizer.state_dict(), first.weight.detach())
    assert torch.equal(whole.weight, second.weight)
    kept, optimizer = run(slice(0, 6), None)
    layer, optimizer = run(slice(6, 12), 2, optimizer.state_dict(), kept.weight.detach())
    assert len(optimizer.touched(layer)) <= 18  # of three steps at most, this one and two before
