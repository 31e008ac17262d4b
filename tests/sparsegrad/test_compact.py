"""Gradients as torch and other optimizers meet them: thrown away, clipped, unscaled, summed, taken by a stranger."""

import copy

import literal
import pytest
import torch
from literal import train

from sparsegrad import CompactGradient, SparseGradAdamW, clip_grad_norm_, merge, param_groups, sparsify

BACKWARD = [{"form": form, "select_in": "backward"} for form in ("folded", "rotated")]
STEP = [{"form": "folded"}, {"form": "rotated"}, {"form": "truncated", "update": "side", "keep": 4}]
WHOLE = [{"form": "truncated", "update": update} for update in ("in_place", "side")]
by_options = pytest.mark.parametrize("options", BACKWARD + STEP + WHOLE, ids=lambda o: "-".join(map(str, o.values())))


@pytest.fixture
def made(blocks, block_bases, block_patterns):
    """``made(options)``: a sparsified stack of blocks and its optimizer."""

    def make(options, dtype=torch.float64):
        model = sparsify(blocks(dtype), block_bases(), 9, block_patterns, **options)
        return model, SparseGradAdamW(param_groups(model), lr=0.1)

    return make


def loss(model, seed=0, scale=1.0):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * model(x.to(model.head.weight.dtype))).square().sum()


def kept(model):
    """Every gradient's numbers, of compact ones the entries."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.entries if isinstance(g, CompactGradient) else g.flatten() for g in gradients]


# ---- thrown away ----


THROW = {
    "zero_grad": lambda model: model.zero_grad(),
    "zero_grad to zero": lambda model: model.zero_grad(set_to_none=False),
    "by hand": lambda model: [setattr(p, "grad", None) for p in model.parameters()],
}


@by_options
@pytest.mark.parametrize("how", THROW)
@pytest.mark.parametrize("clipped", [False, True])
def test_a_gradient_that_was_thrown_away_is_never_applied(options, how, clipped, made):
    model, optimizer = made(options)
    before = literal.snapshot(model)
    loss(model).backward()
    if clipped:
        clip_grad_norm_(model, 1.0)
    THROW[how](model)
    optimizer.step()
    literal.assert_unchanged(model, before)


@pytest.mark.parametrize("options", BACKWARD + WHOLE, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("how", THROW)
def test_after_one_that_was_thrown_away_the_next_is_stepped_with(options, how, made):
    (model, optimizer), (other, other_optimizer) = made(options), made(options)
    loss(model, seed=1).backward()
    THROW[how](model)
    for net, opt in ((model, optimizer), (other, other_optimizer)):
        loss(net).backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@by_options
def test_a_gradient_for_the_input_alone_leaves_none_behind(options, made):
    """An attack or a saliency map between two steps: only the loss that was stepped with counts."""
    model, optimizer = made(options)
    other, other_optimizer = made(options)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    for net, opt in ((model, optimizer), (other, other_optimizer)):
        if net is model:
            torch.autograd.grad(net(x).sum(), x)
            assert not kept(net)
        loss(net).backward()
        if net is model:
            torch.autograd.grad(net(x).sum(), x)
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# ---- torch's own functions ----


@pytest.mark.parametrize("options", BACKWARD, ids=lambda o: o["form"])
@pytest.mark.parametrize("foreach", [None, True])
def test_torchs_clipping_is_ours(options, foreach, made):
    """By the norm to the bit of rounding, by value entry by entry; optimizer and accelerate call these."""
    (model, _), (ours, _) = made(options), made(options)
    for net in (model, ours):
        loss(net).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=foreach)
    torch.testing.assert_close(norm, clip_grad_norm_(ours, 0.1))
    for found, expected in zip(kept(model), kept(ours), strict=True):
        torch.testing.assert_close(found, expected)
    before = [gradient.clone() for gradient in kept(model)]
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3, foreach=foreach)
    assert any((gradient.abs() > 1e-3).any() for gradient in before)
    for found, old in zip(kept(model), before, strict=True):
        torch.testing.assert_close(found, old.clamp(-1e-3, 1e-3))


def test_what_needs_the_other_entries_is_refused_in_one_line(made):
    model, _ = made(BACKWARD[0])
    loss(model).backward()
    gradient = model.layers[0].up.weight.grad
    assert repr(gradient) == "CompactGradient(9 entries of (12, 8))"
    for act in (lambda: gradient + 1, lambda: gradient @ torch.ones(8), gradient.flatten, gradient.sum):
        with pytest.raises(RuntimeError, match=r"^[^\n]+$"):
            act()


# ---- one that is not finite ----


@by_options
@pytest.mark.parametrize("where", ["head.bias", "layers.0.norm.weight"])
def test_one_bad_gradient_is_named_and_spreads_to_no_other(options, where, made):
    model, _ = made(options)
    loss(model).backward()
    model.get_parameter(where).grad[0] = torch.nan
    clean = [g.clone() for n, p in model.named_parameters() if n != where and (g := p.grad) is not None]
    with pytest.raises(ValueError, match=rf"gradient of {where} holds non-finite values"):
        clip_grad_norm_(model, 1.0)
    assert all(torch.isfinite(torch.linalg.vector_norm(gradient)) for gradient in clean)
    assert sum(not torch.isfinite(gradient).all() for gradient in kept(model)) == 1


@by_options
def test_what_torchs_clipping_spread_is_not_stepped_with(options, made):
    model, optimizer = made(options)
    before = literal.snapshot(model)
    loss(model).backward()
    model.head.bias.grad[0] = torch.nan
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"gradient of layers\.[01]\.\w+.* holds non-finite values"):
        optimizer.step()
    literal.assert_unchanged(model, before)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_a_norm_that_would_turn_or_end_the_steps_is_refused(bad, made):
    with pytest.raises(ValueError, match=f"max_norm={bad}; it must be above 0"):
        clip_grad_norm_(made(STEP[0])[0], bad)


# ---- other optimizers ----


STRANGERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
}


@by_options
@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_optimizer_is_refused_before_its_first_step(options, stranger, made):
    """In a copy of the model too, and in the groups that are meant for SparseGradAdamW."""
    model = copy.deepcopy(made(options)[0])
    before = literal.snapshot(model)
    for given in (model.parameters(), param_groups(model)):
        optimizer = STRANGERS[stranger](given)
        loss(model).backward()
        with pytest.raises(ValueError, match=r"holds the weights of SparseGrad layers.*to a Trainer as optimizers="):
            optimizer.step()
        model.zero_grad()
    literal.assert_unchanged(model, before)


@by_options
def test_steps_go_on_after_what_users_do_between_them(options, made):
    """Averaged weights put in and out, a state loaded over a gradient that was thrown away, a cast."""
    model, optimizer = made(options)
    train(model, optimizer, range(2))
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.99)
    train(model, optimizer, range(2, 3))
    loss(model).backward()
    model.zero_grad()
    model.load_state_dict(state)
    train(model.float().double(), optimizer, range(3, 4))
    merge(model)
