"""What layers and optimizer say of themselves before a CUDA graph is made of a step, and in print."""

import copy

import pytest
import torch
import torch.nn.functional as F
from literal import train

from sparsegrad import (
    FoldedLinear,
    RotatedLinear,
    SparseGradAdamW,
    TruncatedLinear,
    foreach,
    param_groups,
    sparsegrad_layers,
    sparsify,
)

OUT, IN, K = 9, 6, 7


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(IN, OUT, dtype=torch.float64)


@pytest.mark.parametrize(
    ("layer_class", "options", "waits"),
    [
        (FoldedLinear, {}, ""),
        (FoldedLinear, {"select_in": "backward"}, "gradients are selected in the backward pass"),
        (RotatedLinear, {}, ""),
        (RotatedLinear, {"matmul": "sparse_by_dense"}, "the rows that sparse by dense leaves out are counted"),
        (TruncatedLinear, {}, ""),
    ],
)
def test_a_layer_says_what_its_passes_wait_for(layer_class, options, waits, linear, random_basis):
    assert layer_class(linear.weight, linear.bias, random_basis(OUT, IN), K, **options).pass_waits_for == waits


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", ["folded", "rotated", "truncated"])
def test_a_step_that_selects_on_a_cpu_is_not_captured(form, fused, blocks, block_bases, block_patterns):
    """There kernels select, which need a card; a whole core's step is AdamW's, static where it is fused."""
    model = sparsify(blocks(), block_bases(), 8, block_patterns, form=form)
    assert SparseGradAdamW(param_groups(model), fused=fused).capturable == (fused and form == "truncated")


def test_room_that_is_made_ahead_moves_no_step(blocks, block_bases, block_patterns):
    """A graph steps the tensors that there are: they stay the same ones for several steps after one that made room."""
    plain = sparsify(blocks(), block_bases(), 8, block_patterns)
    ahead = copy.deepcopy(plain)
    steps = SparseGradAdamW(param_groups(plain), lr=0.01), SparseGradAdamW(param_groups(ahead), lr=0.01)
    assert steps[1].reserve() == ()
    replaced = []
    for step in range(6):
        train(plain, steps[0], [step])
        train(ahead, steps[1], [step])
        replaced.append(steps[1].reserve())
    assert len(replaced[0]) == len(block_bases()) and replaced[1:] == replaced[:1] * 5
    for one, other in zip(plain.parameters(), ahead.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("basis", [True, False], ids=["rotated", "as it is"])
def test_a_frozen_weight_that_would_select_in_the_backward_pass_lets_the_input_have_its_gradient(
    basis, linear, random_basis
):
    layer = FoldedLinear(linear.weight, linear.bias, random_basis(OUT, IN) if basis else None, K, select_in="backward")
    layer.weight.requires_grad_(False)
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, linear.weight, linear.bias).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    assert layer.weight.grad is None and layer.bias.grad is not None


@pytest.mark.parametrize(
    ("form", "options", "said"),
    [
        ("folded", {}, "k=8, select_in=step"),
        ("rotated", {"select_in": "backward"}, "k=8, select_in=backward"),
        ("truncated", {"ranks": (2, 4)}, "ranks=(2, 4), keep=None, update=in_place"),
    ],
)
def test_a_printed_model_says_sizes_and_options(form, options, said, blocks, block_bases, block_patterns):
    model = sparsify(blocks(), block_bases(), 8, block_patterns, form=form, **options)
    text = repr(model)
    for layer in sparsegrad_layers(model).values():
        assert f"in_features={layer.in_features}, out_features={layer.out_features}, {said}" in text
        assert f"U={tuple(layer.basis.U.shape)}, V={tuple(layer.basis.V.shape)}" in text


def test_an_unknown_precision_of_the_rotation_is_refused(linear, random_basis):
    with pytest.raises(ValueError, match="rotation='half'; allowed: auto, float32, tf32, bf16"):
        FoldedLinear(linear.weight, linear.bias, random_basis(OUT, IN), K, rotation="half")


def test_a_rotation_in_bfloat16_selects_nearly_the_entries_of_float64(random_basis):
    """On a CPU too, where it is asked for."""
    torch.manual_seed(0)
    basis, found = random_basis(48, 32), {}
    x, target = torch.randn(64, 32), torch.randn(64, 48)
    for dtype, rotation in ((torch.float64, "auto"), (torch.float32, "bf16")):
        layer = FoldedLinear(
            torch.linspace(-1, 1, 48 * 32, dtype=dtype).view(48, 32), None, basis.to(dtype), 30, rotation=rotation
        )
        F.mse_loss(layer(x.to(dtype)), target.to(dtype)).backward()
        indices, values = layer.take_gradient()
        found[rotation] = torch.zeros(48 * 32, dtype=torch.float64).index_put_((indices,), values.double())
    difference = (found["bf16"] - found["auto"]).norm() / found["auto"].norm()
    assert 1e-6 < difference < 0.2


def test_what_dense_moments_hold_is_written_as_compact_ones_write_it(blocks, block_bases, block_patterns):
    states, sizes = [], []
    for moments in ("compact", "dense"):
        model = sparsify(blocks(), block_bases(), 8, block_patterns)
        optimizer = SparseGradAdamW(param_groups(model), lr=0.01, moments=moments)
        train(model, optimizer, range(3))
        states.append(optimizer.state_dict()["state"])
        sizes.append(optimizer.moment_bytes())
    assert states[0].keys() == states[1].keys()
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    entries = sum(layer.weight.numel() for layer in sparsegrad_layers(model).values())
    assert sizes[1] == entries * (2 * 8 + 1) > sizes[0]  # two moments in float64 and a mark


def test_unknown_moments_are_refused(linear):
    with pytest.raises(ValueError, match="moments='sparse'; allowed: compact, dense"):
        SparseGradAdamW(linear.parameters(), moments="sparse")


@pytest.mark.parametrize("form", [FoldedLinear, RotatedLinear])
def test_a_weight_put_into_a_bfloat16_layer_keeps_its_float32(form, random_basis):
    linear = torch.nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer = form(linear.weight, linear.bias, random_basis(OUT, IN, dtype=torch.float32), K)
    weight = torch.randn(OUT, IN)
    layer.set_original(weight)
    torch.testing.assert_close(layer.original_weight(), weight, rtol=0, atol=1e-5)
    assert layer.weight.dtype == torch.bfloat16 and layer.master.dtype == torch.float32


def test_weights_that_steps_move_are_told_from_those_that_stay(linear, random_basis):
    basis = random_basis(OUT, IN)
    moves = {}
    for name, layer_class, options in (
        ("folded", FoldedLinear, {}),
        ("in_place", TruncatedLinear, {"update": "in_place"}),
        ("side", TruncatedLinear, {"update": "side"}),
    ):
        layer = layer_class(linear.weight, linear.bias, basis, K, **options)
        before = layer.weight.detach().clone()
        optimizer = SparseGradAdamW(param_groups(layer), lr=0.1)
        layer(torch.ones(2, IN, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        moves[name] = layer.moves_weight
        assert torch.equal(layer.weight, before) != layer.moves_weight
    assert moves == {"folded": True, "in_place": True, "side": False}


def test_lists_of_tensors_are_added_to_and_zeroed():
    tensors = [torch.ones(3), torch.full((2, 2), 2.0)]
    foreach.add_(tensors, [torch.arange(3.0), torch.ones(2, 2)])
    assert tensors[0].tolist() == [1, 2, 3] and tensors[1].tolist() == [[3, 3], [3, 3]]
    foreach.zero_(tensors)
    assert not any(tensor.any() for tensor in tensors)
