"""Copies of a model and its optimizer: averaged weights, deepcopy, pickle, and schedulers with their state."""

import copy
import pickle

import pytest
import torch
from literal import train
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsegrad import SparseGradAdamW, merge, param_groups, sparsify

OPTIONS = [
    {"form": "folded"},
    {"form": "folded", "select_in": "backward"},
    {"form": "rotated"},
    {"form": "truncated", "update": "in_place"},
    {"form": "truncated", "update": "side"},
    {"form": "truncated", "keep": 4},
]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))


@pytest.fixture
def made(blocks, block_bases, block_patterns):
    """``made(options)``: a sparsified stack of blocks and its optimizer."""

    def make(options, steps=0, lr=1e-2):
        model = sparsify(blocks(), block_bases(), 9, block_patterns, **options)
        optimizer = SparseGradAdamW(param_groups(model), lr=lr)
        if steps:
            train(model, optimizer, range(steps))
        return model, optimizer

    return make


def assert_equal(one, other):
    for (name, p), q in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@by_options
def test_averaged_weights_are_those_of_the_merged_models(options, made):
    """torch's EMA of the model, merged, against the same of plain models along the way."""
    model, optimizer = made(options)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    plain = AveragedModel(merge(copy.deepcopy(model)), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        ema.update_parameters(model)
        plain.update_parameters(merge(copy.deepcopy(model)))
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(ema(x), plain(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(merge(copy.deepcopy(ema))(x), ema(x), rtol=0, atol=1e-10)
    assert not torch.allclose(ema(x), model(x), rtol=0, atol=1e-6)
    train(model, optimizer, range(3, 4))  # and training goes on


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


@by_options
@pytest.mark.parametrize("how", COPIES)
def test_a_model_and_its_optimizer_go_on_as_a_copy(options, how, made):
    """Copied together, as an experiment is forked; bit for bit with the original, which the copy leaves alone."""
    model, optimizer = made(options, steps=2)
    twin, its_optimizer = COPIES[how]((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    train(twin, its_optimizer, range(2, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    train(model, optimizer, range(2, 5))
    assert_equal(model, twin)


@by_options
def test_a_model_goes_through_a_file_and_on_with_a_new_optimizers_state(options, made, tmp_path):
    """``torch.save`` of the whole model, and of the optimizer's state alone."""
    model, optimizer = made(options, steps=2)
    torch.save(model, tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    its_optimizer = SparseGradAdamW(param_groups(twin), lr=1e-2)
    its_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for net, own in ((model, optimizer), (twin, its_optimizer)):
        train(net, own, range(2, 4))
    assert_equal(model, twin)


# ---- schedulers ----

SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=8, cycle_momentum=True),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


def scheduled(model, optimizer, scheduler, steps):
    rates = []
    for step in steps:
        train(model, optimizer, range(step, step + 1))
        given = [1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []
        scheduler.step(*given)
        rates.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_goes_on_from_its_state(kind, made, blocks):
    """Rates (of OneCycle the momenta too) are AdamW's; a run cut in two takes the same steps."""
    model, optimizer = made(OPTIONS[0])
    rates = scheduled(model, optimizer, SCHEDULERS[kind](optimizer), range(6))
    plain = blocks()
    adamw = torch.optim.AdamW([{"params": [p]} for p in list(plain.parameters())[:2]], lr=1e-2)
    scheduler = SCHEDULERS[kind](adamw)
    assert rates == scheduled(plain, adamw, scheduler, range(6))
    assert rates[0] != rates[-1]

    first, its_optimizer = made(OPTIONS[0])
    its_scheduler = SCHEDULERS[kind](its_optimizer)
    scheduled(first, its_optimizer, its_scheduler, range(3))
    second, own = made(OPTIONS[0])
    own_scheduler = SCHEDULERS[kind](own)
    second.load_state_dict(first.state_dict())
    own.load_state_dict(its_optimizer.state_dict())
    own_scheduler.load_state_dict(its_scheduler.state_dict())
    assert scheduled(second, own, own_scheduler, range(3, 6)) == rates[3:]
    assert_equal(second, model)
