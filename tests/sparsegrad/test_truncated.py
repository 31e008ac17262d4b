"""The truncated form against nn.Linear, the rotated form, and torch.optim; what it saves, holds and never forms."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from literal import IN, OUT, assert_unchanged, batches, loss_of, plain, snapshot, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsegrad import (
    Basis,
    QuantizedTruncatedLinear,
    RotatedLinear,
    SparseGradAdamW,
    TruncatedLinear,
    clip_grad_norm_,
    collect_moments,
    core_shape,
    load_adapter,
    load_tensors,
    merge,
    param_groups,
    refresh,
    save_adapter,
    sparsegrad_layers,
    sparsify,
)

R, C = 4, 3
UPDATES = ["in_place", "side"]
update_modes = pytest.mark.parametrize("update", UPDATES)
both_sides = pytest.mark.parametrize("side", ["both", "input"])


def build(linear, basis, **options):
    return TruncatedLinear(linear.weight, linear.bias, basis, R * C, **({"ranks": (R, C)} | options))


def of_side(side, bases):
    return {kind: basis.input_side() if side == "input" else basis for kind, basis in bases.items()}


def steps(layer, data, loss=loss_of, **options):
    """Weight and bias after each step of SparseGradAdamW."""
    optimizer = SparseGradAdamW(param_groups(layer), **options)
    for batch in data:
        optimizer.zero_grad()
        loss(layer, *batch).backward()
        optimizer.step()
        yield layer.original_weight().clone(), layer.bias.detach().clone()


def perturb(layer):
    """A core that is not zero, where the form keeps one."""
    layer.add_(torch.arange(R * C), torch.randn(R * C, dtype=layer.core.dtype))


# ---- the same function and the same steps ----


def in_leading_block(basis, n):
    """Inputs in the span of U_c and a loss that sees y through V_r alone: all of G_rot lies in the leading block."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        a = torch.randn(15, C, generator=generator, dtype=torch.float64)
        yield a @ basis.U[:C], torch.randn(15, R, generator=generator, dtype=torch.float64), basis.V[:R]


def block_loss(layer, x, target, V_r):
    return ((torch.tanh(layer(x) @ V_r.T) - target) ** 2).sum()


@update_modes
@pytest.mark.parametrize("keep", [None, R * C, 5], ids=["whole", "top_all", "top_5"])
def test_twenty_steps_equal_the_rotated_form_where_gradients_lie_in_the_block(update, keep, random_basis):
    """No mask is given: the rotated form's top k of all entries turn out to be those of the block.

    The whole core follows AdamW, whose eps stands inside the bias correction and lazy Adam's outside: equal as eps
    vanishes. With a top k inside the core both forms follow lazy Adam, at any eps.
    """
    linear, basis = plain(), random_basis(OUT, IN)
    options = {"lr": 0.02, "eps": 1e-30 if keep is None else 1e-8}
    data = list(in_leading_block(basis, 20))
    rotated = RotatedLinear(linear.weight, linear.bias, basis, keep or R * C)
    mine = steps(build(linear, basis, update=update, keep=keep), data, block_loss, **options)
    for (W, b), (W_rot, b_rot) in zip(mine, steps(rotated, data, block_loss, **options), strict=True):
        torch.testing.assert_close(W, W_rot, rtol=0, atol=1e-10)
        torch.testing.assert_close(b, b_rot, rtol=0, atol=1e-10)
    assert (W - linear.weight).abs().max() > 1e-2


def test_the_block_is_not_the_whole_where_gradients_leave_it(random_basis):
    """The control of the test above: on other data the two forms part."""
    linear, basis, data = plain(), random_basis(OUT, IN), list(batches(3, 2))
    *_, (W, _) = steps(build(linear, basis), data, lr=0.02)
    *_, (W_rot, _) = steps(RotatedLinear(linear.weight, linear.bias, basis, R * C), data, lr=0.02)
    assert (W - W_rot).abs().max() > 1e-3


@update_modes
@both_sides
@pytest.mark.parametrize("fused", [False, True], ids=["default", "fused"])
def test_a_whole_core_follows_torchs_adamw_without_weight_decay(update, side, fused, random_basis):
    """y = x (W + V_r^T S U_c)^T + b with S and b trained by torch; a core of all outputs has no V_r."""
    linear, basis = plain(), random_basis(OUT, IN)
    layer = TruncatedLinear(linear.weight, linear.bias, of_side(side, {"": basis})[""], 3 * OUT + 2, update=update)
    r, c = (5, 5) if side == "both" else (OUT, 3)
    assert layer.ranks == (r, c) and len(layer.basis.V) == (5 if side == "both" else 0)
    V_r = basis.V[:r] if side == "both" else torch.eye(OUT, dtype=torch.float64)
    S, b = torch.zeros(r, c, dtype=torch.float64, requires_grad=True), linear.bias.detach().clone().requires_grad_()
    adamw, data = torch.optim.AdamW([S, b], lr=0.03, weight_decay=0, fused=fused or None), list(batches(12))
    for batch, (W, bias) in zip(data, steps(layer, data, lr=0.03, fused=fused), strict=True):
        adamw.zero_grad()
        loss_of(lambda x: F.linear(x, linear.weight.detach() + V_r.T @ S @ basis.U[:c], b), *batch).backward()
        adamw.step()
        torch.testing.assert_close(W, (linear.weight + V_r.T @ S @ basis.U[:c]).detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(bias, b.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.rotated_weight(), V_r @ layer.original_weight() @ basis.U[:c].T)


# ---- what is saved, held and formed ----


@both_sides
@pytest.mark.parametrize(
    ("update", "precision"),
    [(u, p) for u in UPDATES for p in ("float32", "autocast", "bfloat16") if (u, p) != ("in_place", "bfloat16")],
)
def test_exactly_n_times_c_numbers_are_saved_and_the_input_is_let_go(update, side, precision, random_basis):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    linear, basis = plain(dtype=dtype), of_side(side, {"": random_basis(OUT, IN, dtype=torch.float32)})[""]
    layer = TruncatedLinear(
        linear.weight, linear.bias, basis, OUT * C, ranks=(len(basis.V[:R]) or OUT, C), update=update
    )
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    saved = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own and tensor.numel():
            saved.append(tensor)
        return tensor

    leaf = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    x = leaf * 1
    alive = weakref.ref(x)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        y = layer(x)
    (z,) = saved
    assert z.shape == (15, C) and z.is_contiguous()
    assert z.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
    assert z.untyped_storage().nbytes() == 15 * C * z.element_size()  # no view of something larger
    del x
    assert alive() is None
    y.float().sum().backward()
    assert leaf.grad is not None and layer.core.grad.dtype == torch.float32


class LargeResults(TorchDispatchMode):
    """Operations whose result is a new tensor of a weight's shape, either way round."""

    def __init__(self, shape):
        super().__init__()
        self.shapes, self.found = (shape, shape[::-1]), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(t)}
        for tensor in filter(is_tensor, torch.utils._pytree.tree_leaves(result)):
            if tuple(tensor.shape) in self.shapes and tensor.untyped_storage().data_ptr() not in old:
                self.found.append(str(func))
        return result


def is_tensor(value):
    return isinstance(value, torch.Tensor)


@update_modes
@pytest.mark.parametrize("keep", [None, 5], ids=["whole", "top_5"])
def test_no_gradient_or_state_of_the_weights_size_is_formed(update, keep, random_basis):
    """Forward, backward, clipping and step; the folded form, the control, forms several."""
    layer = build(plain(), random_basis(OUT, IN), update=update, keep=keep)
    optimizer = SparseGradAdamW(param_groups(layer), lr=0.01)
    x = torch.randn(20, IN, dtype=torch.float64, requires_grad=True)

    def step(layer, optimizer):
        with LargeResults((OUT, IN)) as large:
            layer(x).square().sum().backward()
            clip_grad_norm_(layer, 1.0)
            optimizer.step()
        return large.found

    assert step(layer, optimizer) == [] and step(layer, optimizer) == []
    assert (layer.weight.grad is None and layer.core.grad is None) or layer.core.grad.shape == (R, C)
    sizes = {optimizer.moment_bytes() // 24} | {t.numel() for t in optimizer.state[layer.core].values() if t.dim()}
    assert 0 < max(sizes) <= R * C
    buffers = sum(b.numel() for b in layer.buffers())
    assert buffers == R * OUT + C * IN + 1  # the leading rows, and the count of refreshes
    folded = sparsify(nn.Sequential(plain()), {"a": random_basis(OUT, IN)}, 5, {"a": "0"})
    assert step(folded, SparseGradAdamW(param_groups(folded)))


def test_a_layer_alone_keeps_the_leading_rows_only(random_basis):
    layer = build(plain(), random_basis(OUT, IN))
    for rows, number in ((layer.basis.V, R * OUT), (layer.basis.U, C * IN)):
        assert rows.numel() == number and rows.untyped_storage().nbytes() == number * 8
    assert build(plain(), layer.basis).basis is layer.basis  # shared as it is


def test_the_side_path_shares_the_frozen_weight_and_in_place_copies_it(random_basis):
    linear = plain()
    side, own = (build(linear, random_basis(OUT, IN), update=u) for u in ("side", "in_place"))
    before = linear.weight.detach().clone()
    assert side.weight.data_ptr() == linear.weight.data_ptr() != own.weight.data_ptr()
    for layer in (side, own):
        perturb(layer)
        layer.rebase(layer.basis)
    assert torch.equal(linear.weight, before)


@update_modes
@pytest.mark.parametrize("keep", [None, 5], ids=["whole", "top_5"])
def test_clipping_counts_what_the_step_will_take(update, keep, random_basis):
    layer = build(plain(), random_basis(OUT, IN), update=update, keep=keep)
    loss_of(layer, *next(batches(1))).backward()
    G, bias = layer.core.grad.clone(), layer.bias.grad.clone()
    kept = G.flatten()[G.abs().flatten().topk(keep or R * C).indices.sort().values]
    norm = torch.cat((kept, bias)).norm()
    torch.testing.assert_close(clip_grad_norm_(layer, 0.1), norm)
    torch.testing.assert_close(layer.bias.grad, bias * (0.1 / (norm + 1e-6)))
    torch.testing.assert_close(layer.take_gradient()[1], kept * (0.1 / (norm + 1e-6)))


# ---- precision ----


def test_defaults_by_precision_and_refusals(random_basis):
    basis = random_basis(OUT, IN, dtype=torch.float32)
    for dtype, update in ((torch.float64, "in_place"), (torch.float32, "in_place"), (torch.bfloat16, "side")):
        layer = build(plain(dtype=dtype), basis)
        assert layer.update == update and layer.core.dtype == torch.promote_types(dtype, torch.float32)
    with pytest.raises(ValueError, match="update='in_place' would lose small steps in torch.bfloat16: use update='si"):
        build(plain(dtype=torch.bfloat16), basis, update="in_place")


def test_casts_leave_core_and_bases_in_float32_and_the_function_alone(random_basis):
    layer = build(plain(dtype=torch.float32), random_basis(OUT, IN, dtype=torch.float32))
    perturb(layer)
    linear = layer.to_linear().bfloat16()
    layer.bfloat16()
    perturb(layer)
    core = layer.core.detach().clone()
    x = torch.randn(4, IN).bfloat16()
    y = layer(x)
    assert torch.equal(layer.weight, linear.weight) and not torch.equal(y, linear(x))
    for cast in (layer.half, layer.float, lambda: layer.to("cpu", torch.bfloat16)):
        cast()
        assert torch.equal(layer.core, core) and layer.update == "side" and layer.basis.U.dtype == torch.float32
    layer.double()
    assert layer.core.dtype == torch.float64 and torch.equal(layer.core, core.double())


# ---- refresh ----


def training_model(blocks, block_bases, block_patterns, dtype=torch.float64, side="both", k=9, **options):
    bases = of_side(side, block_bases(dtype=torch.promote_types(dtype, torch.float32)))
    model = sparsify(blocks(dtype=dtype), bases, k, block_patterns, form="truncated", **options)
    return model, SparseGradAdamW(param_groups(model), lr=1e-2)


@update_modes
@both_sides
@pytest.mark.parametrize("state", ["reset", "carry"])
def test_a_refresh_leaves_the_function_and_changes_the_block(update, side, state, blocks, block_bases, block_patterns):
    model, optimizer = training_model(blocks, block_bases, block_patterns, side=side, k=25, update=update)
    train(model, optimizer, range(3))
    x = torch.randn(5, 8, dtype=torch.float64)
    y, weights = model(x), {n: layer.original_weight().clone() for n, layer in sparsegrad_layers(model).items()}
    layer, new = model.layers[0].up, block_bases(7)  # with a V: an input side does not need it
    in_original = layer.basis.rotate_back(optimizer.state[layer.core]["exp_avg"])
    assert refresh(model, new, optimizer, state=state) is model
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    assert model.layers[1].up.basis is layer.basis and torch.equal(layer.basis.U, new["up"].U[: layer.ranks[1]])
    if state == "carry":
        torch.testing.assert_close(optimizer.state[layer.core]["exp_avg"], layer.basis.rotate(in_original))
    else:
        assert layer.core not in optimizer.state
    train(model, optimizer, range(3, 6))
    for name, layer in sparsegrad_layers(model).items():
        r, c = layer.ranks
        basis = of_side(side, new)[layer.kind]
        moved = basis.rotate(layer.original_weight() - weights[name])
        assert moved[:r, :c].abs().min() > 1e-6
        moved[:r, :c] = 0
        assert moved.abs().max() < 1e-12  # nowhere else in the new coordinates
    torch.testing.assert_close(merge(copy.deepcopy(model))(x), model(x), rtol=0, atol=1e-12)


def test_carried_moments_turn_with_the_basis_and_a_refresh_to_the_same_basis_is_none(
    blocks, block_bases, block_patterns
):
    models = [training_model(blocks, block_bases, block_patterns) for _ in range(2)]
    for model, optimizer in models:
        train(model, optimizer, range(4))
    (one, first), (other, second) = models
    refresh(other, block_bases(), second, state="carry")
    for model, optimizer in models:
        train(model, optimizer, range(4, 8))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)

    layer = one.layers[0].up
    v = first.state[layer.core]["exp_avg_sq"].clone()
    refresh(one, {"up": block_bases(5)["up"]}, first, state="carry")
    assert torch.equal(first.state[layer.core]["exp_avg_sq"], v) and int(first.state[layer.core]["step"]) == 8
    assert int(one.layers[0].down.refreshes) == 0 and int(layer.refreshes) == 1
    refresh(one, {"up": block_bases()["up"]}, first, state="reset")
    assert layer.core not in first.state and one.layers[0].down.core in first.state


def test_a_refresh_in_bfloat16_keeps_what_rounding_would_lose(blocks, block_bases, block_patterns):
    """Within the new block nothing is lost; without the residual, the control, small steps would be."""
    model, optimizer = training_model(blocks, block_bases, block_patterns, dtype=torch.bfloat16)
    optimizer.param_groups[1]["lr"] = 1e-5
    train(model, optimizer, range(3), torch.bfloat16)
    layer, new = model.layers[0].up, block_bases(dtype=torch.float32)["up"]
    exact = layer.original_weight()
    change = (new.V @ (exact - layer.weight) @ new.U.T)[:3, :3]
    rounded = (new.V @ (exact.bfloat16() - layer.weight.float()) @ new.U.T)[:3, :3]
    refresh(model, {"up": new}, optimizer)
    assert layer.weight.dtype == torch.bfloat16 and layer.core.dtype == torch.float32
    kept = (new.V @ (layer.original_weight() - exact) @ new.U.T)[:3, :3]
    assert kept.norm() < 1e-2 * change.norm() < (rounded - change).norm()


@pytest.mark.parametrize(
    ("bases", "options", "text"),
    [
        ({}, {"state": "keep"}, "state='keep'; allowed: reset, carry"),
        ({"gate": (12, 8)}, {}, r"bases for layer kinds \['gate'\]; kinds of this model's truncated layers: down, up"),
        ({"up": (8, 12)}, {}, r"layers.0.up: the new basis is for weights of shape \(8, 12\), this one has \(12, 8\)"),
        ({"up": (12, 8, 2)}, {}, "layers.0.up: the new basis has 2 and 2 rows, not 3 and 3"),
    ],
)
def test_a_refresh_that_does_not_fit_is_refused(
    bases, options, text, random_basis, blocks, block_bases, block_patterns
):
    model, optimizer = training_model(blocks, block_bases, block_patterns, keep=4)
    train(model, optimizer, range(2))
    before = snapshot(model)

    def make(out_features, in_features, rank=None):
        full = random_basis(out_features, in_features)
        return Basis(full.U[:rank], full.V[:rank])

    with pytest.raises(ValueError, match=text):
        refresh(model, {kind: make(*sizes) for kind, sizes in bases.items()}, optimizer, **options)
    with pytest.raises(ValueError, match="with keep the moments are lazy: use state='reset'"):
        refresh(model, block_bases(1), optimizer, state="carry")
    skewed = Basis(1.01 * block_bases(1)["up"].U, block_bases(1)["up"].V)
    with pytest.raises(ValueError, match="layers.0.up: the basis is off orthogonality by"):
        refresh(model, {"up": skewed}, optimizer)
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    with pytest.raises(ValueError, match="layers.0.up holds a gradient in the old basis: refresh after optimizer.ste"):
        refresh(model, block_bases(1), optimizer)
    with pytest.raises(ValueError, match="truncated layers: none"):
        refresh(nn.Linear(2, 2), {})
    assert_unchanged(model, before)


# ---- states and files ----


@pytest.mark.parametrize(("saved", "loaded"), [("in_place", "side"), ("side", "in_place")])
def test_a_state_of_one_update_loads_into_the_other(saved, loaded, blocks, block_bases, block_patterns):
    model, optimizer = training_model(blocks, block_bases, block_patterns, update=saved)
    train(model, optimizer, range(3))
    other, _ = training_model(blocks, block_bases, block_patterns, update=loaded)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    assert loaded == "side" or not any(layer.core.any() for layer in sparsegrad_layers(other).values())


@update_modes
@pytest.mark.parametrize("refreshed", [False, True], ids=["one_basis", "refreshed"])
@pytest.mark.parametrize(
    ("k", "side", "options"),
    [
        (9, "both", {}),
        (9, "both", {"keep": 4}),
        (24, "both", {"ranks": {"up": [6, 2], "down": [2, 5]}}),  # the budget alone would make another core
        (24, "input", {}),
    ],
    ids=["whole", "top_4", "oblong", "input"],
)
def test_an_adapter_comes_back(update, refreshed, k, side, options, blocks, block_bases, block_patterns, tmp_path):
    """It holds the core and not the matrix, unless earlier bases have moved the matrix elsewhere."""
    config = {"k": k, "target_modules": block_patterns, "form": "truncated", "update": update, **options}
    model = sparsify(blocks(), of_side(side, block_bases()), **config)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    train(model, optimizer, range(3))
    if refreshed:
        refresh(model, block_bases(3), optimizer)
        train(model, optimizer, range(3, 5))
    save_adapter(tmp_path / "a", model)
    tensors = load_tensors(tmp_path / "a")[0]
    assert max(t.numel() for name, t in tensors.items() if name.startswith("values.")) <= k
    assert any(t.shape in ((12, 8), (8, 12)) for t in tensors.values()) == refreshed
    base = load_adapter(tmp_path / "a", blocks())
    assert base.layers[1].down.ranks == model.layers[1].down.ranks
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(base(x), model(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(merge(base)(x), model(x), rtol=0, atol=1e-10)


# ---- quantised weights ----


class PackedLinear(nn.Linear):
    """Stores bytes in one column, as bitsandbytes' 4 bit linear does, and computes in its input's dtype."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=torch.float32)
        with torch.no_grad():
            scale = linear.weight.abs().max() / 127
            packed = (linear.weight / scale).round().to(torch.int8).view(torch.uint8).reshape(-1, 1)
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.bias = None if linear.bias is None else nn.Parameter(linear.bias.float())
        self.register_buffer("scale", scale.float())

    def forward(self, x):
        weight = self.weight.view(torch.int8).reshape(self.out_features, self.in_features).float() * self.scale
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def exact(self):
        return (self.weight.view(torch.int8).reshape(self.out_features, self.in_features).float() * self.scale).double()


def packed_blocks(blocks):
    model = blocks(dtype=torch.float32)
    for block in model.layers:
        block.up, block.down = PackedLinear(block.up), PackedLinear(block.down)
    return model


def assert_equal_moments(model, other, patterns):
    batch = torch.randn(5, 8)
    one, two = (collect_moments(m, [batch], patterns, loss_fn=lambda m, x: m(x).square().sum()) for m in (model, other))
    for kind in patterns:
        torch.testing.assert_close(one[kind].left, two[kind].left, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one[kind].right, two[kind].right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("keep", [None, 4], ids=["whole", "top_4"])
def test_a_quantised_model_trains_like_its_dequantised_copy(keep, blocks, block_bases, block_patterns, tmp_path):
    """Side path on both; then merged, and as an adapter on a fresh copy. The bytes never change."""
    reference, model = packed_blocks(blocks), packed_blocks(blocks)
    for block in reference.layers:
        for kind in ("up", "down"):
            packed = getattr(block, kind)
            linear = nn.Linear(packed.in_features, packed.out_features)
            linear.load_state_dict({"weight": packed.exact().float(), "bias": packed.bias})
            setattr(block, kind, linear)
    bases, config = block_bases(), {"k": 9, "target_modules": block_patterns, "form": "truncated", "keep": keep}
    assert_equal_moments(model, reference, block_patterns)
    with pytest.raises(ValueError, match=r"0.up: the weight is quantised \(PackedLinear\): use form='truncated'"):
        sparsify(model, bases, 9, block_patterns)
    with pytest.raises(ValueError, match="layers.0.up: update='in_place'; a quantised weight takes no steps"):
        sparsify(model, bases, update="in_place", **config)
    sparsify(model, bases, **config)
    sparsify(reference, bases, update="side", **config)
    for one in (model, reference):
        optimizer = SparseGradAdamW(param_groups(one), lr=1e-2)
        train(one, optimizer, range(5), torch.float32)
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-5)
    assert_equal_moments(model, reference, block_patterns)
    assert model.layers[0].up.core.abs().max() > 1e-2
    assert torch.equal(model.layers[0].up.weight, packed_blocks(blocks).layers[0].up.weight)

    save_adapter(tmp_path / "a", model)
    torch.testing.assert_close(load_adapter(tmp_path / "a", packed_blocks(blocks))(x), model(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="layers.0.up is quantised: its weight can't take the core in"):
        refresh(model, bases)
    model.bfloat16()
    assert model.layers[0].up.core.dtype == torch.float32
    assert model(x.bfloat16()).dtype == torch.bfloat16
    y = model.float()(x)
    assert type(merge(model).layers[0].up) is nn.Linear and model.layers[0].up.weight.dtype == torch.float32
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)


def test_a_quantised_layer_is_its_linear_at_first_and_saves_z_alone(random_basis):
    packed = PackedLinear(plain())
    layer = QuantizedTruncatedLinear(packed, random_basis(OUT, IN, dtype=torch.float32), R * C)
    x = torch.randn(3, 5, IN)
    torch.testing.assert_close(layer(x), packed(x))
    torch.testing.assert_close(layer.original_weight().double(), packed.exact())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert not [t for t in saved if t.numel() == x.numel()] and [t for t in saved if t.shape == (15, 3)]
    assert layer.core.grad.abs().min() > 0 and packed.weight.grad is None


# ---- the core's shape ----


@pytest.mark.parametrize(
    ("k", "limits", "shape"),
    [
        (23_592, (3072, 768), (153, 153)),  # 1 % of BERT's up projection
        (100_000, (11_008, 4_096), (316, 316)),  # the paper's budget for LLaMa-2
        (1, (5, 4), (1, 1)),
        (20, (5, 4), (5, 4)),
        (50, (3, 100), (3, 16)),
        (50, (100, 3), (16, 3)),
    ],
)
def test_core_shape_spends_at_most_the_budget(k, limits, shape):
    assert core_shape(k, limits) == shape
    with pytest.raises(ValueError, match=f"k={limits[0] * limits[1] + 1}; a matrix of shape .* allows whole numbers"):
        core_shape(limits[0] * limits[1] + 1, limits)


def test_a_core_of_all_outputs_refuses_what_does_not_fit(random_basis):
    basis, linear = random_basis(OUT, IN).input_side(), plain()
    with pytest.raises(ValueError, match=r"k=10; a core of all outputs needs at least 11 entries"):
        TruncatedLinear(linear.weight, linear.bias, basis, 10)
    with pytest.raises(ValueError, match=r"ranks=\(4, 3\); a basis of the input side leaves all 11 outputs"):
        TruncatedLinear(linear.weight, linear.bias, basis, 33, ranks=(4, 3))


# ---- surroundings ----


@update_modes
@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)  # torch's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_is_captured_and_agrees_with_eager(update, backend, random_basis):
    """These backends need no C++ compiler; fullgraph refuses any break."""
    torch._dynamo.reset()
    layer = build(plain(), random_basis(OUT, IN), update=update)
    perturb(layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        x, *rest = next(batches(1))
        x.requires_grad_()
        loss_of(module, x, *rest).backward()
        results.append((x.grad, layer.core.grad.clone(), layer.bias.grad.clone()))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=0, atol=1e-12)


# ---- CUDA ----


@pytest.mark.cuda
@update_modes
def test_a_refresh_on_cuda_leaves_the_function(update, blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 9, block_patterns, form="truncated", update=update).cuda()
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2, fused=True)
    train(model, optimizer, range(3))
    x = torch.randn(5, 8, dtype=torch.float64, device="cuda")
    y = model(x)
    refresh(model, block_bases(4), optimizer, state="carry")
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
