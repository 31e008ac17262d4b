"""Whole optimizer steps: with both kinds of moments, of a gradient that is not finite, on a card in each precision."""

import pytest
import torch

from sparsegrad import NonFiniteGradient, SparseGradAdamW, grouped, merge, param_groups, sparsegrad_layers, sparsify

FORMS = {
    "folded": {"form": "folded"},
    "folded-backward": {"form": "folded", "select_in": "backward"},
    "rotated": {"form": "rotated"},
    "truncated": {"form": "truncated"},
    "side": {"form": "truncated", "update": "side"},
}


@pytest.fixture
def allow_tf32():
    """``allow_tf32(True)``: torch's setting, put back afterwards; monkeypatch can't, it is no plain attribute."""
    before = torch.backends.cuda.matmul.allow_tf32

    def choose(allowed):
        torch.backends.cuda.matmul.allow_tf32 = allowed

    yield choose
    choose(before)


def weights_after(model, steps, *, precision=None, **options):
    """Changes of the plain weights after some steps; the norm of each against that of all is what matters."""
    device = model.head.weight.device
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2, **options)
    before = [layer.original_weight().double().cpu().clone() for layer in sparsegrad_layers(model).values()]
    for number in range(steps):
        x = torch.randn(40, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        x = x.to(device, model.head.weight.dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            y = model(x)
        y.double().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [layer.original_weight().double().cpu() for layer in sparsegrad_layers(model).values()]
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert moved.norm() > 0
    return moved


@pytest.mark.parametrize("form", ["folded", "rotated"])
def test_dense_moments_take_the_steps_of_compact_ones(form, blocks, block_bases, block_patterns):
    found = []
    for moments in ("compact", "dense"):
        model = sparsify(blocks(), block_bases(), 9, block_patterns, form=form)
        found.append(weights_after(model, 20, moments=moments))
    assert torch.equal(*found)


def test_dense_moments_come_back_from_a_state_of_compact_ones(blocks, block_bases, block_patterns):
    models = [sparsify(blocks(), block_bases(), 9, block_patterns) for _ in range(2)]
    first = SparseGradAdamW(param_groups(models[0]), lr=1e-2)
    second = SparseGradAdamW(param_groups(models[1]), lr=1e-2, moments="dense")
    x = torch.randn(40, 8, dtype=torch.float64)
    for _ in range(3):
        models[0](x).square().sum().backward()
        first.step()
        first.zero_grad()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    for one, other in zip(*(sparsegrad_layers(model).values() for model in models), strict=True):
        assert torch.equal(first.touched(one), second.touched(other))
    for model, optimizer in zip(models, (first, second), strict=True):
        model(x).square().sum().backward()
        optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", ["folded", "rotated", "truncated"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_right(
    form, fused, device, blocks, block_bases, block_patterns
):
    models = [sparsify(blocks(torch.float32), block_bases(), 9, block_patterns, form=form).to(device) for _ in range(2)]
    optimizers = [SparseGradAdamW(param_groups(model), lr=1e-2, fused=fused) for model in models]
    x = torch.randn(40, 8).to(device)
    for number in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if number == 1:  # between two good steps of the second model alone
            before = [p.detach().clone() for p in models[1].parameters()]
            models[1](torch.full_like(x, torch.nan)).sum().backward()
            with pytest.raises(NonFiniteGradient, match="holds non-finite values"):
                optimizers[1].step()
            optimizers[1].zero_grad()
            assert all(torch.equal(p, q) for p, q in zip(models[1].parameters(), before, strict=True))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "error"), [("float64", 1e-10), ("float32", 1e-4), ("tf32", 0.25), ("bf16", 0.6)])
@pytest.mark.parametrize("form", FORMS)
def test_steps_on_cuda_are_those_of_float64_on_a_cpu(
    form, precision, error, blocks, block_bases, block_patterns, allow_tf32
):
    """In norm: of 36 entries a step, all moved by as much, some may be others where magnitudes are within rounding."""
    allow_tf32(precision == "tf32")
    dtype = torch.float64 if precision == "float64" else torch.float32
    exact = weights_after(sparsify(blocks(), block_bases(), 9, block_patterns, **FORMS[form]), 3)
    model = sparsify(blocks(dtype), block_bases(dtype=dtype), 9, block_patterns, **FORMS[form]).to("cuda")
    found = weights_after(model, 3, precision=precision, fused=True)
    assert (found - exact).norm() < error * exact.norm()
    assert not sparsegrad_layers(merge(model))


@pytest.mark.parametrize("drop_after", [None, 2])
def test_layers_stepped_in_parts_take_the_same_steps(drop_after, blocks, block_bases, block_patterns, monkeypatch):
    """Large matrices are stepped one by one: entries grow old by steps, not by parts of them."""
    found = []
    for together in (grouped.TOGETHER, 1):
        monkeypatch.setattr(grouped, "TOGETHER", together)
        model = sparsify(blocks(n=3), block_bases(), 9, block_patterns)
        found.append(weights_after(model, 12, drop_after=drop_after))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
