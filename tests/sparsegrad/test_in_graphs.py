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
