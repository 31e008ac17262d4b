"""The layers against nn.Linear, the formulas of Table 2, and a literal loop over W_rot.

The literal loop uses autograd on a plain nn.Linear, a Python sort, torch.optim.SparseAdam and torch.optim.AdamW; it
shares no code with the library.
"""

import copy
import itertools

import literal
import pytest
import torch
from literal import IN, OUT, K, batches, loss_of, plain
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparsegrad import (
    Basis,
    FoldedLinear,
    GradientMoments,
    RotatedLinear,
    SparseGradAdamW,
    TruncatedLinear,
    hosvd,
    param_groups,
    rotation,
    sparsify,
)
from sparsegrad.folded import rotated_product

FOLDED = [("folded", {"select_in": s}) for s in ("step", "backward")]
ROTATED = [
    ("rotated", {"select_in": s, "matmul": m})
    for s, m in itertools.product(("step", "backward"), ("regular", "sparse_by_dense"))
]
TRUNCATED = [  # cores of 3 x 3 and, with a basis of the input side alone, of 11 x 3
    ("truncated", {"side": side, "update": update} | keep)
    for side, update, keep in itertools.product(("both", "input"), ("in_place", "side"), ({}, {"keep": 5}))
]


def forms(cases):
    return pytest.mark.parametrize(
        ("form", "options"), [pytest.param(f, o, id="-".join((f, *map(str, o.values())))) for f, o in cases]
    )


in_step = [case for case in FOLDED + ROTATED if case[1]["select_in"] == "step"]
in_backward = forms(case for case in FOLDED + ROTATED if case[1]["select_in"] == "backward")
selecting, every = forms(FOLDED + ROTATED), forms(FOLDED + ROTATED + TRUNCATED)


def build(form, linear, basis, k=K, side="both", **options):
    layer_class = {"folded": FoldedLinear, "rotated": RotatedLinear, "truncated": TruncatedLinear}[form]
    basis, k = (basis.input_side(), 3 * OUT) if side == "input" else (basis, k)
    return layer_class(linear.weight, linear.bias, basis, k, **options)


def expected(form, options, basis, G):
    """Indices and values of what a step takes of the gradient of a plain linear: V G U^T, or its leading block."""
    G = G @ basis.U.T if options.get("side") == "input" else basis.V @ G @ basis.U.T
    if form == "truncated":
        G = G[:, :3] if options["side"] == "input" else G[:3, :3]
    indices = literal.top_k(G, options.get("keep", G.numel() if form == "truncated" else K))
    return indices, G.flatten()[indices]


def assert_takes(layer, form, options, basis, G):
    indices, values = layer.take_gradient()
    assert indices.dtype == torch.int64 and torch.equal(indices, expected(form, options, basis, G)[0])
    torch.testing.assert_close(values, expected(form, options, basis, G)[1])


def literal_trajectory(linear, basis, update, lr, data):
    """W and b after each step of the paper's algorithm, done the long way."""
    linear = copy.deepcopy(linear)
    U, V = basis.U, basis.V
    W_rot = (V @ linear.weight.detach() @ U.T).requires_grad_()
    rotated_adam, adam = torch.optim.SparseAdam([W_rot], lr=lr), None
    if linear.bias is not None:
        adam = torch.optim.AdamW([linear.bias], lr=lr, weight_decay=0)
    for batch in data:
        linear.zero_grad()
        loss_of(linear, *batch).backward()
        G_rot = V @ linear.weight.grad @ U.T
        indices = literal.top_k(G_rot)
        if update == "sgd":
            with torch.no_grad():
                W_rot.view(-1)[indices] -= lr * G_rot.flatten()[indices]
                if linear.bias is not None:
                    linear.bias -= lr * linear.bias.grad
        else:
            W_rot.grad = literal.coo(indices, G_rot.flatten()[indices], G_rot.shape)
            rotated_adam.step()
            if adam is not None:
                adam.step()
        with torch.no_grad():
            linear.weight.copy_(V.T @ W_rot @ U)
        yield linear.weight.detach().clone(), None if linear.bias is None else linear.bias.detach().clone()


def trajectory(layer, update, lr, data):
    optimizer = SparseGradAdamW(param_groups(layer), lr=lr)
    for batch in data:
        optimizer.zero_grad()
        loss_of(layer, *batch).backward()
        if update == "sgd":
            indices, g = layer.take_gradient()
            layer.add_(indices, -lr * g)
            if layer.bias is not None:
                layer.bias.data -= lr * layer.bias.grad
        else:
            optimizer.step()
        yield layer.original_weight().clone(), None if layer.bias is None else layer.bias.detach().clone()


@selecting
@pytest.mark.parametrize("update", ["sgd", "adam"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dims", [2, 3])
def test_twenty_steps_follow_the_literal_algorithm(form, options, update, bias, dims, random_basis):
    linear, basis, data = plain(bias), random_basis(OUT, IN), list(batches(20, dims))
    layer = build(form, linear, basis, **options)
    steps = zip(
        trajectory(layer, update, 0.02, data), literal_trajectory(linear, basis, update, 0.02, data), strict=True
    )
    for (W, b), (literal_W, literal_b) in steps:
        torch.testing.assert_close(W, literal_W, rtol=0, atol=1e-10)
        if bias:
            torch.testing.assert_close(b, literal_b, rtol=0, atol=1e-10)
    assert (W - linear.weight).abs().max() > 1e-3  # it has moved


# ---- Table 2 of the paper ----


@pytest.mark.parametrize("matmul", ["regular", "sparse_by_dense"])
def test_table_2_of_the_rotated_form(matmul, random_basis):
    """Forward, the parameter, its gradient and the input's gradient, each against the printed formula."""
    linear, basis = plain(bias=False), random_basis(OUT, IN)
    layer = build("rotated", linear, basis, k=OUT * IN, matmul=matmul)
    U, V, W = basis.U, basis.V, linear.weight.detach()
    X = torch.randn(15, IN, dtype=torch.float64, requires_grad=True)
    dY = torch.randn(15, OUT, dtype=torch.float64)
    Y = layer(X)
    torch.testing.assert_close(layer.weight.detach(), V @ W @ U.T)
    torch.testing.assert_close(Y, X @ U.T @ layer.weight.T @ V)
    Y.backward(dY)
    torch.testing.assert_close(layer.weight.grad, V @ dY.T @ X.detach() @ U.T)
    torch.testing.assert_close(X.grad, dY @ W)


def test_d23_the_printed_input_gradient_is_not_the_input_gradient(random_basis):
    """The printed formula does not fit unless the layer is square, and is another matrix then."""
    X, dY = torch.randn(15, OUT, dtype=torch.float64, requires_grad=True), torch.randn(15, OUT, dtype=torch.float64)
    linear, basis = plain(bias=False, in_features=OUT), random_basis(OUT, OUT)
    layer = build("rotated", linear, basis)
    layer(X).backward(dY)
    printed = dY @ basis.U.T @ layer.weight.detach().T @ basis.V
    assert not torch.allclose(printed, X.grad)
    torch.testing.assert_close(X.grad, dY @ linear.weight.detach())
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.randn(15, OUT) @ torch.randn(IN, IN).T @ torch.randn(OUT, IN).T


@every
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_function_and_gradients_are_those_of_linear(form, options, dims, bias, random_basis):
    """Before and after the weight has moved."""
    basis = random_basis(OUT, IN)
    layer = build(form, plain(bias), basis, **options)
    for x, target, mask in batches(2, dims):
        linear = layer.to_linear()
        x_layer, x_linear = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad()
        torch.testing.assert_close(layer(x), linear(x))
        loss_of(layer, x_layer, target, mask).backward()
        loss_of(linear, x_linear, target, mask).backward()
        torch.testing.assert_close(x_layer.grad, x_linear.grad)
        assert (x_layer.grad[~mask.squeeze(-1)] == 0).all() and not mask.all()
        assert_takes(layer, form, options, basis, linear.weight.grad)
        assert layer.take_gradient() is None
        if bias:
            torch.testing.assert_close(layer.bias.grad, linear.bias.grad)
            # D7: the released code returns the gradient after its rotation by V.
            assert not torch.allclose(layer.bias.grad, basis.V @ linear.bias.grad)
        layer.add_(torch.arange(K), torch.randn(K, dtype=torch.float64))


@selecting
@pytest.mark.parametrize("k", [1, K, OUT * IN])
def test_no_basis_is_the_original_space(form, options, k):
    """MeProp's space: the top k of the gradient of linear itself."""
    linear = plain()
    layer = build(form, linear, None, k, **options)
    for module in (layer, linear):
        loss_of(module, *next(batches(1))).backward()
    indices, values = layer.take_gradient()
    assert torch.equal(indices, literal.top_k(linear.weight.grad, k))
    torch.testing.assert_close(values, linear.weight.grad.flatten()[indices])
    layer.add_(indices, -values)
    expected = linear.weight.detach().clone()
    expected.view(-1)[indices] -= values
    torch.testing.assert_close(layer.original_weight(), expected, rtol=0, atol=1e-14)


@selecting
def test_add_moves_the_named_entries_of_the_rotated_weight_only(form, options, random_basis):
    linear, basis = plain(), random_basis(OUT, IN)
    layer = build(form, linear, basis, **options)
    indices = torch.tensor([0, 3, 8, 40, OUT * IN - 1])
    delta = torch.randn(5, dtype=torch.float64)
    expected = (basis.V @ linear.weight.detach() @ basis.U.T).flatten()
    expected[indices] += delta
    layer.add_(indices, delta)
    torch.testing.assert_close(layer.rotated_weight().flatten(), expected)
    torch.testing.assert_close(layer.original_weight(), basis.V.T @ expected.view(OUT, IN) @ basis.U)
    layer.add_(indices[:0], delta[:0])
    torch.testing.assert_close(layer.rotated_weight().flatten(), expected)


@every
def test_autograd_agrees_with_finite_differences(form, options, random_basis):
    options = options if form == "truncated" else options | {"select_in": "step"}
    layer = build(form, plain(), random_basis(OUT, IN), **options)
    layer.add_(torch.arange(K), torch.randn(K, dtype=torch.float64))
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    unread = options.get("update") == "in_place"  # no forward reads the core
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.bias, *(() if unread else (layer.trained,))))


# ---- what a step is ----


@forms(in_step + TRUNCATED)
def test_four_micro_batches_equal_one_batch(form, options, random_basis):
    """The sum is selected, not the parts: the control shows that the parts have other leading entries."""
    linear, basis = plain(), random_basis(OUT, IN)
    whole, cut = build(form, linear, basis, **options), build(form, linear, basis, **options)
    x, target, mask = next(batches(1, 2))
    loss_of(whole, x, target, mask).backward()
    parts = []
    for rows in torch.arange(15).tensor_split(4):
        loss_of(cut, x[rows], target[rows], mask[rows]).backward()
        alone = build(form, linear, basis, **options)
        loss_of(alone, x[rows], target[rows], mask[rows]).backward()
        parts.append(alone.take_gradient()[0])
    (indices, values), (cut_indices, cut_values) = whole.take_gradient(), cut.take_gradient()
    assert torch.equal(indices, cut_indices)
    torch.testing.assert_close(values, cut_values)
    torch.testing.assert_close(whole.bias.grad, cut.bias.grad)
    assert any(not torch.equal(part, indices) for part in parts) == whole.selects


@in_backward
def test_select_in_backward_refuses_a_second_backward(form, options, random_basis):
    layer = build(form, plain(), random_basis(OUT, IN), **options)
    first, second, third = batches(3)
    loss_of(layer, *first).backward()
    with pytest.raises(RuntimeError, match="a second backward pass met a gradient that no optimizer step has taken"):
        loss_of(layer, *second).backward()
    assert len(layer.take_gradient()[0]) == K
    loss_of(layer, *third).backward()  # once the gradient is taken, the next pass is welcome
    layer.zero_gradient()
    assert layer.take_gradient() is None


@in_backward
def test_select_in_backward_refuses_a_layer_that_is_used_twice_in_one_pass(form, options, random_basis):
    """Two selected gradients would add up to as many as 2k entries."""
    layer = build(form, plain(), random_basis(OUT, IN), **options)
    first, second = batches(2)
    with pytest.raises(RuntimeError, match="use select_in='step'"):
        (loss_of(layer, *first) + loss_of(layer, *second)).backward()
        layer.take_gradient()


@forms(in_step + TRUNCATED)
def test_a_layer_that_is_used_twice_or_on_no_rows_in_one_pass_sums(form, options, random_basis):
    linear, basis = plain(), random_basis(OUT, IN)
    layer = build(form, linear, basis, **options)
    first, second = batches(2)
    for module in (layer, linear):
        (loss_of(module, *first) + loss_of(module, *second) + module(first[0][:0]).sum()).backward()
    assert_takes(layer, form, options, basis, linear.weight.grad)


@forms(in_step)
def test_a_backward_after_selection_is_refused(form, options, random_basis):
    """Clipping selects; a micro-batch after that would be added to a part of the sum, or replace it."""
    layer = build(form, plain(), random_basis(OUT, IN), **options)
    first, second = batches(2)
    loss_of(layer, *first).backward()
    layer.select()
    with pytest.raises(RuntimeError, match="clip after the last micro-batch"):
        loss_of(layer, *second).backward()
        layer.take_gradient()


@every
def test_selecting_twice_changes_nothing_and_scaling_scales(form, options, random_basis):
    layer, other = (build(form, plain(), random_basis(OUT, IN), **options) for _ in range(2))
    batch = next(batches(1))
    for module in (layer, other):
        loss_of(module, *batch).backward()
    layer.select()
    layer.select()
    layer.scale_gradient(0.25)
    layer.scale_gradient(torch.tensor(2.0))
    (indices, values), (expected_indices, expected) = layer.take_gradient(), other.take_gradient()
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values, expected / 2)
    layer.scale_gradient(2.0)  # without a gradient: no effect
    assert layer.take_gradient() is None


@selecting
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(form, options, bad, random_basis):
    layer = build(form, plain(), random_basis(OUT, IN), **options)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="gradient holds non-finite values"):
        (layer(torch.randn(4, IN, dtype=torch.float64)) * bad).sum().backward()
        layer.take_gradient()
    assert torch.equal(layer.weight, before)


# ---- surroundings ----


@every
def test_gradient_checkpointing_gives_the_same_gradients(form, options, random_basis):
    linear, basis = plain(), random_basis(OUT, IN)
    x, target, mask = next(batches(1))
    taken = []
    for checkpointed in (False, True):
        layer = build(form, linear, basis, **options)
        x_leaf = x.clone().requires_grad_()

        def body(t, layer=layer):
            return torch.tanh(layer(torch.sin(t)))

        y = checkpoint(body, x_leaf, use_reentrant=False) if checkpointed else body(x_leaf)
        ((y - target) ** 2 * mask).sum().backward()
        taken.append((*layer.take_gradient(), layer.bias.grad, x_leaf.grad))
    for without, with_checkpoint in zip(*taken, strict=True):
        assert torch.equal(without, with_checkpoint)


@every
def test_a_frozen_weight_gets_no_gradient_and_passes_one_on(form, options, random_basis):
    linear = plain()
    layer = build(form, linear, random_basis(OUT, IN), **options)
    layer.trained.requires_grad_(False)
    x, target, mask = next(batches(1))
    x_layer, x_linear = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss_of(layer, x_layer, target, mask).backward()
    loss_of(linear, x_linear, target, mask).backward()
    torch.testing.assert_close(x_layer.grad, x_linear.grad)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)
    assert layer.take_gradient() is None
    with pytest.raises(ValueError, match="1 of 1 SparseGrad layers are frozen"):
        param_groups(layer)
    assert not layer.to_linear().weight.requires_grad


@every
def test_without_gradients_the_forward_is_the_same_and_keeps_nothing(form, options, random_basis):
    linear = plain()
    layer = build(form, linear, random_basis(OUT, IN), **options)
    x = torch.randn(4, IN, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y, linear(x).detach())
    assert not y.requires_grad and layer.take_gradient() is None


@every
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_to_linear_is_the_same_function_and_freezes_what_was_frozen(form, options, bias, random_basis):
    linear = plain(bias)
    layer = build(form, linear, random_basis(OUT, IN), **options)
    layer.add_(torch.arange(K), torch.ones(K, dtype=torch.float64))
    if bias:
        layer.bias.requires_grad_(False)
    back = layer.to_linear()
    assert type(back) is nn.Linear and (back.bias is not None) == bias
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(back(x), layer(x))
    assert back.weight.requires_grad and not (bias and back.bias.requires_grad)
    layer.add_(torch.arange(K), torch.ones(K, dtype=torch.float64))
    assert not torch.allclose(back(x), layer(x))  # a copy, not a view


def test_a_truncated_basis_in_the_folded_form_moves_the_leading_block_only():
    """With every entry of the block kept, the step is the gradient projected on both leading subspaces."""
    linear, moments = plain(), GradientMoments(OUT, IN)
    for batch in batches(6, 2):
        moments.update(torch.autograd.grad(loss_of(linear, *batch), linear.weight)[0])
    basis = hosvd(moments, rank=3)
    batch = next(batches(1, seed=9))
    G = torch.autograd.grad(loss_of(linear, *batch), linear.weight)[0]
    projected = (basis.V.T @ basis.V) @ G @ (basis.U.T @ basis.U)
    for select_in in ("step", "backward"):
        layer = FoldedLinear(linear.weight, linear.bias, basis, 9, select_in=select_in)
        loss_of(layer, *batch).backward()
        indices, values = layer.take_gradient()
        layer.add_(indices, -values)
        torch.testing.assert_close(layer.original_weight(), linear.weight.detach() - projected)


@selecting
def test_the_released_orientation_leaves_the_function_and_takes_v_g_u(form, options, random_basis):
    """D2."""
    linear, basis = plain(), random_basis(OUT, IN)
    layer, batch = build(form, linear, basis.oriented("released"), **options), next(batches(1))
    torch.testing.assert_close(layer(batch[0]), linear(batch[0]))
    for module in (layer, linear):
        loss_of(module, *batch).backward()
    assert_takes(layer, form, options, Basis(basis.U.T, basis.V), linear.weight.grad)


@pytest.mark.parametrize("form", ["folded", "rotated", "truncated"])
def test_two_models_with_different_bases_do_not_disturb_each_other(form, blocks, block_bases, block_patterns):
    """Steps of two models in turn equal the steps of each alone, though both come from one process."""

    def run(*seeds):
        nets = [sparsify(blocks(seed=seed), block_bases(seed), 5, block_patterns, form=form) for seed in seeds]
        optimizers = [SparseGradAdamW(param_groups(net), lr=1e-2) for net in nets]
        for i in range(4):
            for net, optimizer in zip(nets, optimizers, strict=True):
                literal.train(net, optimizer, [i])
        return [net.state_dict() for net in nets]

    for mixed, single in zip(run(0, 1), run(0) + run(1), strict=True):
        assert all(torch.equal(mixed[name], single[name]) for name in single)


# ---- cost ----


def flops(layer, x):
    with FlopCounterMode(display=False) as counter:
        layer(x).square().sum().backward()
    return counter.get_total_flops()


def test_sparse_by_dense_multiplies_only_rows_that_are_not_zero(random_basis):
    """Equations 1-2: with 3 of 12 rows left, the two products of the backward cost a quarter."""
    x = torch.randn(12, IN, dtype=torch.float64)
    mask = (torch.arange(12) < 3).double()[:, None]

    def backward_flops(matmul):
        layer = build("rotated", plain(), random_basis(OUT, IN), matmul=matmul)
        y = layer(x)
        with FlopCounterMode(display=False) as counter:
            (y * mask).square().sum().backward()
        return counter.get_total_flops()

    through_v = 2 * 12 * OUT * OUT  # the gradient passes V before the product, in both
    assert backward_flops("regular") - through_v == 2 * (2 * 12 * OUT * IN)
    assert backward_flops("sparse_by_dense") - through_v == 2 * (2 * 3 * OUT * IN)


@pytest.mark.parametrize("tokens", [3, 8, 40])
def test_folded_rotates_each_side_where_it_is_cheaper(tokens, random_basis):
    """8 tokens are fewer than the 11 outputs and more than the 7 inputs: x before the product, G after it."""
    basis = random_basis(OUT, IN)
    layer = build("folded", plain(), basis, select_in="backward")
    cheapest = min(2 * tokens * IN * IN, 2 * OUT * IN * IN) + min(2 * tokens * OUT * OUT, 2 * IN * OUT * OUT)
    forward_and_product = 2 * (2 * tokens * OUT * IN)
    g, x = (torch.randn(tokens, n, dtype=torch.float64) for n in (OUT, IN))
    assert flops(layer, x) == forward_and_product + cheapest
    torch.testing.assert_close(rotated_product(basis, g, x), basis.rotate(g.T @ x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "ranks", "way"),
    [
        ((60, 40), (60, 40), "V dense"),
        ((60, 40), (5, 40), "U dense"),
        ((40, 60), (40, 60), "U sparse"),
        ((60, 40), (60, 40), "V sparse"),
    ],
)
def test_every_way_to_rotate_an_update_back_is_the_dense_one(shape, ranks, way, random_basis, monkeypatch):
    """What a sparse operation costs is set so that each way is met."""
    basis, taken = random_basis(*shape).leading(*ranks), []
    monkeypatch.setattr(rotation, "SPARSE_COST", 0 if way.endswith("sparse") else 1e9)
    monkeypatch.setattr(rotation, "_sparse", lambda *a, real=rotation._sparse: taken.append(a[3]) or real(*a))
    generator = torch.Generator().manual_seed(1)
    places = torch.stack([torch.randperm(ranks[0] * ranks[1], generator=generator)[:30].sort().values for _ in "abc"])
    delta = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    targets = [torch.full(shape, float(n), dtype=torch.float64) for n in range(3)]
    rotation.Rotation(basis, "auto", torch.float64).back(targets, places, delta)
    for n, target in enumerate(targets):
        D = torch.zeros(ranks[0] * ranks[1], dtype=torch.float64).scatter_(0, places[n], delta[n]).view(ranks)
        torch.testing.assert_close(target, n + basis.V.T @ D @ basis.U, rtol=1e-12, atol=1e-12)
    assert taken == {"V sparse": [(40, 60)], "U sparse": [(40, 60)]}.get(way, [])


# ---- CUDA ----


@pytest.mark.cuda
@pytest.mark.parametrize("update", ["sgd", "adam"])
@selecting
def test_forms_on_cuda_follow_the_literal_algorithm_of_the_cpu(form, options, update, random_basis):
    linear, basis, data = plain(), random_basis(OUT, IN), list(batches(20, 3))
    layer = build(form, linear, random_basis(OUT, IN), **options).to("cuda")  # which moves its basis with it
    on_cuda = [tuple(t.to("cuda") for t in batch) for batch in data]
    steps = zip(
        trajectory(layer, update, 0.02, on_cuda), literal_trajectory(linear, basis, update, 0.02, data), strict=True
    )
    for (W, b), (literal_W, literal_b) in steps:
        torch.testing.assert_close(W.cpu(), literal_W, rtol=0, atol=1e-10)
        torch.testing.assert_close(b.cpu(), literal_b, rtol=0, atol=1e-10)


@pytest.mark.cuda
def test_hosvd_on_cuda_gives_the_subspaces_of_the_cpu():
    linear, cpu, cuda = plain(), GradientMoments(OUT, IN), GradientMoments(OUT, IN, device="cuda")
    for batch in batches(12, 2):
        G = torch.autograd.grad(loss_of(linear, *batch), linear.weight)[0]
        cpu.update(G)
        cuda.update(G)
    one, other = hosvd(cpu), hosvd(cuda)
    assert isinstance(other, Basis) and other.U.is_cuda
    torch.testing.assert_close(other.U.cpu(), one.U, rtol=0, atol=1e-8)
    torch.testing.assert_close(other.V.cpu(), one.V, rtol=0, atol=1e-8)
