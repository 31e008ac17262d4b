"""GradScaler: a step whose gradient overflows is skipped and the scale drops, as with torch's AdamW."""

import copy

import literal
import pytest
import torch

from sparsegrad import (
    CompactGradient,
    NonFiniteGradient,
    SparseGradAdamW,
    clip_grad_norm_,
    param_groups,
    sparsegrad_layers,
    sparsify,
)

OPTIONS = [
    {"form": "folded", "select_in": "backward"},
    {"form": "rotated", "select_in": "backward"},
    {"form": "folded"},
    {"form": "rotated"},
    {"form": "truncated", "update": "in_place"},
    {"form": "truncated", "update": "side", "keep": 4},
]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def made(blocks, block_bases, block_patterns):
    """``made(options, device)``: a sparsified stack of blocks and its optimizer."""

    def make(options, device="cpu"):
        model = sparsify(blocks(torch.float32), block_bases(dtype=torch.float32), 9, block_patterns, **options)
        model.to(device)
        return model, SparseGradAdamW(param_groups(model), lr=1e-2)

    return make


def loss(model, seed, scale=1.0):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    return (model(x.to(model.head.weight.device)).float() * scale).square().sum()


def scaled_steps(model, optimizer, device, overflow_at=(), clip=None):
    """Steps of batches 0 to 3, and the scale after each."""
    scaler, scales = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=100), []
    for seed in range(4):
        optimizer.zero_grad()
        handles = []
        if seed in overflow_at:  # one infinity, where a gradient enters the last block
            layer = model.layers[-1].down
            handles.append(layer.register_full_backward_hook(lambda _m, given, _out: (given[0] * torch.inf,)))
        scaler.scale(loss(model, seed)).backward()
        for handle in handles:
            handle.remove()
        if clip is not None:
            scaler.unscale_(optimizer)
            clip(model)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@by_options
@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_is_skipped_and_the_scale_drops_as_with_adamw(options, device, made, blocks):
    """And the other steps are those of a run that never met that batch; scales are powers of two, so to rounding."""
    model, optimizer = made(options, device)
    scales = scaled_steps(model, optimizer, device, overflow_at=[1])
    plain = blocks(torch.float32).to(device)
    assert scales == scaled_steps(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), device, overflow_at=[1])
    assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**9]
    other, other_optimizer = made(options, device)
    for seed in (0, 2, 3):
        other_optimizer.zero_grad()
        loss(other, seed).backward()
        other_optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


CLIPS = {
    "torch's": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5),
    "ours": lambda model: clip_grad_norm_(model, 0.5, error_if_nonfinite=False),
}


@by_options
@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_between_leaves_an_overflow_to_the_scaler(options, clip, made):
    model, optimizer = made(options)
    seen = []

    def watched(net):
        seen.append(torch.isfinite(CLIPS[clip](net)).item())

    assert scaled_steps(model, optimizer, "cpu", overflow_at=[0, 2], clip=watched) == [2.0**9, 2.0**9, 2.0**8, 2.0**8]
    assert seen == [False, True, False, True]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@by_options
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_without_a_scaler_the_step_is_refused_and_nothing_moves(options, bad, made):
    model, optimizer = made(options)
    before = literal.snapshot(model)
    loss(model, 0, scale=bad).backward()
    with pytest.raises(NonFiniteGradient, match=r"gradient of layers\.\d\.\w+"):
        optimizer.step()
    literal.assert_unchanged(model, before)
    optimizer.zero_grad()
    loss(model, 1).backward()
    optimizer.step()  # and the next one is taken
    assert not all(torch.equal(t, before[1][n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("options", OPTIONS[:2], ids=lambda o: o["form"])
def test_one_layers_overflow_in_a_backward_pass_is_seen_by_who_asks_the_layer(options, made):
    """The k entries of largest magnitude may all be finite where another, say a NaN, is not."""
    model, _ = made(options)
    layer = sparsegrad_layers(model)["layers.0.up"]
    gradient = torch.ones(12, 8)
    gradient[3, 4] = torch.nan
    layer.trained.grad = layer.compact(gradient)
    assert layer.trained.grad.entries.isnan().all()
    with pytest.raises(NonFiniteGradient, match=r"layers\.0\.up"):
        layer.take_gradient()
    assert layer.trained.grad is None


@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda o: "-".join(o.values()))
def test_half_precision_trains_under_autocast(options, made):
    """A scale too large for float16 is halved until steps are taken, and then they are."""
    model, optimizer = made(options)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**24), copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(24):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss(model, 0)
        losses.append(value.item())
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 1 < scaler.get_scale() < 2.0**24
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert not torch.equal(model.state_dict()["layers.0.up.weight"], before["layers.0.up.weight"])


@by_options
def test_every_gradient_is_unscaled(options, made):
    """To the bit: the scale is a power of two."""
    (model, optimizer), (plain, _) = made(options), made(options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss(model, 0)).backward()
    loss(plain, 0).backward()
    scaler.unscale_(optimizer)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        found, expected = (g.entries if isinstance(g := t.grad, CompactGradient) else g for t in (p, q))
        assert found is expected is None or torch.equal(found, expected)
