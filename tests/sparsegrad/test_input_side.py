"""The truncated form with a basis of the input side alone: the rows of the core are the outputs themselves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsegrad import (
    Basis,
    FoldedLinear,
    SparseGradAdamW,
    TruncatedLinear,
    load_adapter,
    merge,
    param_groups,
    refresh,
    save_adapter,
    sparsegrad_layers,
    sparsify,
)

OUT, IN, C = 11, 7, 3
update_modes = pytest.mark.parametrize("update", ["in_place", "side"])


def plain(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, dtype=dtype)


def batches(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        yield tuple(torch.randn(3, 5, f, generator=generator, dtype=torch.float64).to(dtype) for f in (IN, OUT))


def loss_of(y, target):
    return ((torch.tanh(y) - target) ** 2).sum()


def literal_steps(linear, U, n):
    """y = x (W + S U_c)^T + b, S and b trained by torch's AdamW."""
    S = torch.zeros(OUT, C, dtype=torch.float64, requires_grad=True)
    b = linear.bias.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([S, b], lr=1e-2, weight_decay=0.0)
    for x, target in batches(n):
        optimizer.zero_grad()
        loss_of(F.linear(x, linear.weight.detach() + S @ U[:C], b), target).backward()
        optimizer.step()
        yield (linear.weight + S @ U[:C]).detach(), b.detach().clone()


@update_modes
def test_steps_are_those_of_a_trained_factor_beside_the_leading_input_directions(update, random_basis):
    linear, basis = plain(), random_basis(OUT, IN)
    layer = TruncatedLinear(linear.weight, linear.bias, basis.input_side(), OUT * C + 2, update=update)
    assert layer.ranks == (OUT, C) and layer.basis.V.shape == (0, OUT)
    optimizer = SparseGradAdamW(param_groups(layer), lr=1e-2)
    expected = literal_steps(linear, basis.U, 12)
    for (x, target), (W, b) in zip(batches(12), expected, strict=True):
        optimizer.zero_grad()
        loss_of(layer(x), target).backward()
        optimizer.step()
        torch.testing.assert_close(layer.original_weight(), W, rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.bias.detach(), b, rtol=0, atol=1e-10)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.rotated_weight(), layer.original_weight() @ basis.U[:C].T)


@update_modes
def test_the_gradient_of_the_core_is_the_weights_gradient_in_the_input_directions(update, random_basis):
    linear, basis = plain(), random_basis(OUT, IN)
    layer = TruncatedLinear(linear.weight, linear.bias, basis.input_side(), OUT * C, update=update)
    (x, target) = next(batches(1))
    x = x.requires_grad_()
    ours = torch.autograd.grad(loss_of(layer(x), target), [x, layer.core, layer.bias])
    dx, dW, db = torch.autograd.grad(loss_of(linear(x), target), [x, linear.weight, linear.bias])
    for found, expected in zip(ours, (dx, dW @ basis.U[:C].T, db), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if update == "side":
        layer.core.data.normal_()
        x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))


def test_n_times_c_numbers_are_saved(random_basis):
    layer = TruncatedLinear(
        plain(torch.float32).weight, None, random_basis(OUT, IN, dtype=torch.float32).input_side(), OUT * C
    )
    own, saved = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(3, 5, IN, requires_grad=True) * 1).sum()
    (z,) = (tensor for tensor in saved if tensor.numel())
    assert z.shape == (15, C) and z.untyped_storage().nbytes() == 15 * C * 4


@update_modes
@pytest.mark.parametrize("state", ["reset", "carry"])
def test_a_refresh_leaves_the_function_and_turns_the_moments(update, state, blocks, block_bases, block_patterns):
    bases = {kind: basis.input_side() for kind, basis in block_bases().items()}
    model = sparsify(blocks(), bases, 25, block_patterns, form="truncated", update=update)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    x = torch.randn(5, 8, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    layer = model.layers[0].up
    y, m = model(x), optimizer.state[layer.core]["exp_avg"] @ layer.basis.U
    new = block_bases(7)  # with a V: it is not needed
    refresh(model, new, optimizer, state=state)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    for found in sparsegrad_layers(model).values():
        assert not found.basis.rotates_output and torch.equal(found.basis.U, new[found.kind].U[: found.ranks[1]])
    assert layer.basis is model.layers[1].up.basis
    if state == "carry":
        turned = m @ layer.basis.U.T
        torch.testing.assert_close(optimizer.state[layer.core]["exp_avg"], turned)
    else:
        assert layer.core not in optimizer.state


@update_modes
def test_an_adapter_and_a_merged_model_come_back(update, blocks, block_bases, block_patterns, tmp_path):
    config = {"k": 25, "target_modules": block_patterns, "form": "truncated", "update": update}
    bases = {kind: basis.input_side() for kind, basis in block_bases().items()}
    model = sparsify(blocks(), bases, **config)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    x = torch.randn(5, 8, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    save_adapter(tmp_path / "a", model, optimizer, config)
    loaded = load_adapter(tmp_path / "a", blocks())
    assert loaded.layers[0].up.ranks == (12, 2) and loaded.layers[0].down.ranks == (8, 3)
    for found in (loaded, merge(copy.deepcopy(loaded)), merge(copy.deepcopy(model))):
        torch.testing.assert_close(found(x), model(x), rtol=0, atol=1e-10)


def test_refusals_say_what_would_fit(random_basis):
    basis, linear = random_basis(OUT, IN), plain()
    with pytest.raises(ValueError, match=r"k=10; a core of all outputs needs at least 11 entries"):
        TruncatedLinear(linear.weight, linear.bias, basis.input_side(), 10)
    with pytest.raises(ValueError, match=r"ranks=\(4, 3\); a basis of the input side leaves all 11 outputs"):
        TruncatedLinear(linear.weight, linear.bias, basis.input_side(), 33, ranks=(4, 3))
    with pytest.raises(ValueError, match="a basis of the input side is for form 'truncated'"):
        FoldedLinear(linear.weight, linear.bias, basis.input_side(), 9)
    with pytest.raises(ValueError, match="orientation='released'"):
        basis.input_side().oriented("released")


def test_a_basis_of_the_input_side_rotates_that_side_alone(random_basis):
    full = random_basis(OUT, IN)
    basis, W = full.input_side(), torch.randn(OUT, IN, dtype=torch.float64)
    assert basis.ranks == (OUT, IN) and not basis.is_full and not basis.rotates_output
    torch.testing.assert_close(basis.rotate(W), W @ full.U.T)
    torch.testing.assert_close(basis.rotate_back(basis.rotate(W)), W)
    assert basis.orthogonality_error() < 1e-12
    assert isinstance(basis.leading(OUT, 2), Basis) and basis.leading(OUT, 2).ranks == (OUT, 2)
    assert basis.leading(OUT, IN) is basis
