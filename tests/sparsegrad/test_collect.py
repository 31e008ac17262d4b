"""The preliminary phase: moments of the model's own gradients, from a model that is left as it was."""

import copy

import pytest
import torch
from torch import nn

from sparsegrad import (
    SparseGradAdamW,
    collect_moments,
    find_targets,
    hosvd,
    merge,
    param_groups,
    refresh,
    sparsegrad_layers,
    sparsify,
)

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


@pytest.mark.parametrize("batch", [torch.ones(2, 3), (torch.ones(2, 3), torch.ones(2)), "input_ids"])
def test_a_batch_that_is_no_mapping_needs_a_loss(batch, blocks, block_patterns):
    with pytest.raises(ValueError, match=rf"a batch is a {type(batch).__name__}: .* give loss_fn"):
        collect_moments(blocks(), [batch], block_patterns)


def test_what_a_model_gives_may_be_no_loss(blocks, block_patterns):
    batch = {"x": torch.ones(2, 8, dtype=torch.float64)}
    with pytest.raises(ValueError, match="has no loss: give batches with labels, or a loss_fn"):
        collect_moments(blocks(), [batch], block_patterns)


def test_no_batch_or_no_target_is_refused(blocks, block_patterns):
    with pytest.raises(ValueError, match="no batch was given"):
        collect_moments(blocks(), [], block_patterns)
    with pytest.raises(ValueError, match="target_modules.up='nothing' matches no module in full"):
        collect_moments(nn.Sequential(nn.Linear(2, 2)), batches(), {"up": "nothing"})


# ---- of a sparsified model ----


def trained(model, form, bases, patterns, steps=2, **options):
    sparsify(model, bases, 9, patterns, form=form, **options)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def assert_equal_moments(ours, theirs):
    assert ours.keys() == theirs.keys()
    for kind, moments in ours.items():
        assert moments.count == theirs[kind].count
        torch.testing.assert_close(moments.left, theirs[kind].left, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(moments.right, theirs[kind].right, rtol=1e-10, atol=1e-10)


FORMS = [
    ("folded", {}),
    ("folded", {"select_in": "backward"}),
    ("rotated", {}),
    ("rotated", {"matmul": "sparse_by_dense", "select_in": "backward"}),
    ("truncated", {}),
    ("truncated", {"update": "side", "keep": 4}),
]


@pytest.mark.parametrize("shared", [False, True], ids=["each its own", "one layer twice"])
@pytest.mark.parametrize(("form", "options"), FORMS)
def test_gradients_of_layers_are_those_of_the_merged_weights(
    form, options, shared, blocks, block_bases, block_patterns
):
    """In original coordinates, at the weights as they are; and nothing stays behind."""
    model = blocks()
    if shared:
        model.layers[1].up = model.layers[0].up
        options = {name: "step" if name == "select_in" else value for name, value in options.items()}
    model, _ = trained(model.eval(), form, block_bases(), block_patterns, **options)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    moments = collect_moments(model, batches(), block_patterns, loss_fn=loss_fn)
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in sparsegrad_layers(model).values())
    merged = merge(copy.deepcopy(model))
    assert_equal_moments(moments, collect_moments(merged, batches(), block_patterns, loss_fn=loss_fn))


@pytest.mark.parametrize("update", ["in_place", "side"])
def test_bases_are_collected_and_renewed_in_the_middle_of_training(update, blocks, block_bases, block_patterns):
    model, optimizer = trained(blocks(), "truncated", block_bases(), block_patterns, update=update)
    before = model(batches()[0]["x"]).detach()
    merged = merge(copy.deepcopy(model))
    expected = {k: hosvd(m) for k, m in collect_moments(merged, batches(), ["up", "down"], loss_fn=loss_fn).items()}
    found = collect_moments(model, batches(), ["up", "down"], loss_fn=loss_fn)
    refresh(model, {kind: hosvd(moments) for kind, moments in found.items()}, optimizer)
    torch.testing.assert_close(model(batches()[0]["x"]).detach(), before, rtol=0, atol=1e-12)
    for layer in sparsegrad_layers(model).values():
        torch.testing.assert_close(layer.basis.U, expected[layer.kind].U[: len(layer.basis.U)], rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.basis.V, expected[layer.kind].V[: len(layer.basis.V)], rtol=0, atol=1e-6)


def test_an_optimizer_may_step_a_sparsified_model_meanwhile(blocks, block_bases, block_patterns):
    """As long training would, with the gradients at every step's weights."""
    model, optimizer = trained(blocks(), "folded", block_bases(), block_patterns)
    twin, steps = copy.deepcopy(model), 3
    other = SparseGradAdamW(param_groups(twin), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    expected = []
    for batch in batches(steps):
        merged = merge(copy.deepcopy(twin))
        expected.append(collect_moments(merged, [batch], block_patterns, loss_fn=loss_fn)["up"].left)
        loss_fn(twin, batch).backward()
        other.step()
        other.zero_grad()
    moments = collect_moments(model, batches(steps), block_patterns, loss_fn=loss_fn, optimizer=optimizer)
    torch.testing.assert_close(moments["up"].left, sum(expected))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])


@pytest.mark.parametrize("sparsified", [False, True])
def test_a_kind_without_a_gradient_is_refused(sparsified, random_basis, blocks, block_patterns):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2).double(), "unused": nn.Linear(4, 4)})
    patterns = {"out": r"attention\.out_proj"}
    if sparsified:
        sparsify(model, {"out": random_basis(8, 8)}, 9, patterns)
    patterns |= {} if sparsified else {"none": "unused"}

    def loss(model, batch):
        return model.attention(batch["x"], batch["x"], batch["x"])[0].square().sum()

    kind = "out" if sparsified else "none"
    with pytest.raises(ValueError, match=rf"no gradient came to layers of kind {kind}: .* nn.MultiheadAttention does"):
        collect_moments(model, batches(), patterns, loss_fn=loss)
