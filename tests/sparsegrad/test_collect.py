"""The preliminary phase: moments of the model's own gradients, from a model that is left as it was."""

import copy

import pytest
import torch
from torch import nn

from sparsegrad import collect_moments, find_targets

KINDS = {"up": (12, 8), "down": (8, 12)}


def batches(n=3):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(5, 8, generator=generator, dtype=torch.float64)} for _ in range(n)]


def loss_fn(model, batch):
    return model(batch["x"]).square().sum()


def by_hand(model, patterns, optimizer=None):
    gradients = {kind: [] for kind in KINDS}
    for batch in batches():
        model.zero_grad()
        loss_fn(model, batch).backward()
        for target in find_targets(model, patterns):
            gradients[target.kind].append(target.module.weight.grad.clone())
        if optimizer is not None:
            optimizer.step()
    return {kind: torch.stack(found) for kind, found in gradients.items()}


@pytest.mark.parametrize("moves", [False, True], ids=["still", "stepped"])
def test_moments_are_of_the_gradients_by_hand(moves, blocks, block_patterns):
    mine, theirs = blocks(), blocks()
    steps = [torch.optim.AdamW(model.parameters(), lr=1e-2) if moves else None for model in (mine, theirs)]
    seen = {kind: [] for kind in KINDS}
    moments = collect_moments(
        mine,
        batches(),
        block_patterns,
        loss_fn=loss_fn,
        optimizer=steps[0],
        on_gradient=lambda kind, G: seen[kind].append(G.clone()),
    )
    for kind, G in by_hand(theirs, block_patterns, steps[1]).items():
        assert moments[kind].count == len(G) == 6 and {g.shape for g in seen[kind]} == {KINDS[kind]}
        torch.testing.assert_close(moments[kind].left, (G @ G.mT).sum(0))
        torch.testing.assert_close(moments[kind].right, (G.mT @ G).sum(0))
    start = blocks().state_dict()
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name])
        assert torch.equal(tensor, start[name]) is not moves


@pytest.mark.parametrize("fails", [False, True], ids=["to the end", "interrupted"])
def test_the_model_comes_back_as_it_was(fails, blocks, block_patterns):
    model = blocks().eval()
    model.layers[1].train()
    model.layers[0].up.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    before, seen = copy.deepcopy(model.state_dict()), []

    def loss(model, batch):
        seen.append(
            (all(m.training for m in model.modules()), [p.requires_grad for p in model.parameters()].count(True))
        )
        return loss_fn(model, batch) * (torch.nan if fails and len(seen) == 2 else 1)

    if fails:
        with pytest.raises(ValueError, match="loss is nan at batch 2: check the checkpoint and data"):
            collect_moments(model, batches(), block_patterns, loss_fn=loss)
    else:
        collect_moments(model, batches(), block_patterns, loss_fn=loss)
    assert set(seen) == {(True, 4)}  # in training mode; the targets alone are differentiated
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_models_own_loss_is_taken(tiny_transformer):
    model, patterns, tokens = tiny_transformer("bert")
    batch = {"input_ids": tokens, "labels": torch.tensor([0, 1])}
    moments = collect_moments(model, [batch] * 2, patterns, [1])
    assert {kind: m.count for kind, m in moments.items()} == {"up": 2, "down": 2}
    with pytest.raises(ValueError, match="has no loss: give batches with labels, or a loss_fn"):
        collect_moments(model, [{"input_ids": tokens}], patterns)


def test_no_batch_or_no_target_is_refused(blocks, block_patterns):
    with pytest.raises(ValueError, match="no batch was given"):
        collect_moments(blocks(), [], block_patterns)
    with pytest.raises(ValueError, match="target_modules.up='nothing' matches no module in full"):
        collect_moments(nn.Sequential(nn.Linear(2, 2)), batches(), {"up": "nothing"})
