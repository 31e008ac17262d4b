"""A random selection of entries: as PEFT's SHiRA with the same mask, as written out in plain torch, and even."""

import peft
import pytest
import torch
from scipy.stats import chisquare

from finetune.methods import build_method
from finetune.methods.random_entries import Drawn
from sparsegrad import clip_grad_norm_, sparsegrad_layers

K, LR = 96, 1e-2  # SHiRA's r = 1 of 64 x 32


@pytest.fixture
def batch(load):
    return load("cola")[1]["train"].batch(range(16))


@pytest.fixture
def method(config):
    def make(name, seed=0):
        found = config(f"method={name}", "protocol.density=null", f"model.k={K}", "protocol.train=targets")
        return build_method(found["method"], found["model"], found["protocol"], seed=seed)

    return make


def step(model, optimizer, batch, clip=None):
    model(**batch).loss.backward()
    if clip is not None:
        clip_grad_norm_(model, clip)
    optimizer.step()
    optimizer.zero_grad()


def without_eps(optimizer):
    """Lazy Adam adds eps before the bias correction, AdamW after it: the one thing in which they differ."""
    for group in optimizer.param_groups:
        group["eps"] = 1e-30
    return optimizer


def biases_fixed(method, model):
    for target in method.targets.find(model):
        target.module.bias.requires_grad_(False)


def test_fixed_entries_are_shira_with_the_same_mask(method, classifier, batch):
    chosen = method("random_entries", seed=3)
    model = chosen.prepare(classifier(dropout=False).double())
    kept = {name: layer.rule(layer.weight, K) for name, layer in sparsegrad_layers(model).items()}
    for layer in sparsegrad_layers(model).values():
        layer.bias.requires_grad_(False)
    optimizer = without_eps(chosen.optimizer(model, LR, 0.0))

    plain = classifier(dropout=False).double()
    own = {id(plain.get_submodule(name).weight): places for name, places in kept.items()}
    adapter = peft.ShiraConfig(r=1, target_modules=sorted(kept))
    adapter.mask_fn = lambda layer, r, **_: (
        torch.zeros(64 * 32).scatter(0, own[id(layer.weight)], 1.0).view(layer.weight.shape)
    )
    shira = peft.get_peft_model(plain, adapter)
    weights = [p for p in shira.parameters() if p.requires_grad]
    assert sum(p.numel() for p in weights) == 4 * K
    for parameter in weights:
        parameter.data = parameter.data.double()
    theirs = without_eps(torch.optim.AdamW(weights, lr=LR, weight_decay=0.0))

    for _ in range(5):
        step(model, optimizer, batch)
        step(shira, theirs, batch)
    merged = shira.merge_and_unload()
    for name, weight in chosen.merge(model).named_parameters():
        torch.testing.assert_close(weight, dict(merged.named_parameters())[name], rtol=0, atol=1e-12)
    assert any((merged.get_submodule(n).weight - classifier().get_submodule(n).weight).abs().max() > 1e-2 for n in kept)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["random_entries", "random_entries_redrawn"])
def test_steps_are_those_of_a_reference_in_float64(name, clip, method, classifier, batch):
    """Lazy Adam written out: moments of the drawn entries alone move, the step count is the run's."""
    chosen = method(name, seed=5)
    model = chosen.prepare(classifier(dropout=False).double())
    reference = classifier(dropout=False).double().requires_grad_(False)
    weights = []
    for layer_name, layer in sparsegrad_layers(model).items():
        layer.bias.requires_grad_(False)
        weights.append(reference.get_submodule(layer_name).weight.requires_grad_(True))
    optimizer = chosen.optimizer(model, LR, 0.0)
    m, v = ([torch.zeros_like(w).flatten() for w in weights] for _ in range(2))
    moved = []
    for t in range(1, 6):
        step(model, optimizer, batch, clip)
        gradients = torch.autograd.grad(reference(**batch).loss, weights)
        draw = t - 1 if name.endswith("redrawn") else 0
        kept = [Drawn((5, number)) for number in range(4)]
        for rule in kept:
            rule.draw = draw
        places = [rule(g, K) for rule, g in zip(kept, gradients, strict=True)]
        values = [g.flatten()[at] for g, at in zip(gradients, places, strict=True)]
        if clip is not None:
            norm = torch.cat(values).norm()
            values = [value * min(1.0, clip / (norm + 1e-6)) for value in values]
        moved.append(places[0])
        for weight, at, g, first, second in zip(weights, places, values, m, v, strict=True):
            first[at] = 0.9 * first[at] + 0.1 * g
            second[at] = 0.999 * second[at] + 0.001 * g**2
            size = LR * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
            weight.data.view(-1)[at] -= size * first[at] / (second[at].sqrt() + 1e-8)
    for (layer_name, layer), weight in zip(sparsegrad_layers(model).items(), weights, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-12, msg=layer_name)
    assert torch.equal(moved[0], moved[1]) != name.endswith("redrawn")


def test_what_is_drawn_follows_from_seed_matrix_and_step(method, classifier):
    def drawn(seed):
        model = method("random_entries", seed).prepare(classifier())
        return [layer.rule(layer.weight, K) for layer in sparsegrad_layers(model).values()]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    every = [tuple(places.tolist()) for places in (*first, *other)]
    assert len(set(every)) == 8 and all(len(set(places)) == K for places in every)


@pytest.mark.parametrize("k", [1, 20, 60, 100])
def test_every_entry_is_drawn_as_often(k):
    rule, counts = Drawn((0,)), torch.zeros(100)
    for rule.draw in range(2000):
        places = rule(counts, k)
        assert len(places) == k and (places.diff() > 0).all()
        counts[places] += 1
    assert counts.sum() == 2000 * k
    if k < 100:  # the counts of a draw without replacement vary less than chi-square says, by 1 - k / 100
        assert chisquare(counts.numpy()).statistic / (1 - k / 100) < 150 and counts.min() > 0


def test_numbers_for_tables_and_plan(method, classifier, batch):
    fixed, redrawn = method("random_entries"), method("random_entries_redrawn")
    assert fixed.entries((64, 32)) == redrawn.entries((64, 32)) == K
    model = redrawn.prepare(classifier())
    optimizer = redrawn.optimizer(model, LR, 0.0)
    assert optimizer.state_dict()["param_groups"][-1]["draws"] == 0
    step(model, optimizer, batch)
    assert optimizer.state_dict()["param_groups"][-1]["draws"] == 1
