"""New bases while training: from exact gradients, at the right steps, and a killed run goes on as one that was not."""

import pytest
import torch
import torch.nn.functional as F

from finetune.methods import build_method, with_own_choices
from finetune.training.refreshing import GradientCollector, RefreshOptions
from sparsegrad import Basis, GradientMoments, hosvd, sparsegrad_layers, sparsify

TARGETS = {"up": r"(?P<layer>\d)\.up", "down": r"(?P<layer>\d)\.down"}


class Blocks(torch.nn.ModuleList):
    def __init__(self):
        super().__init__(
            torch.nn.ModuleDict({"up": torch.nn.Linear(6, 10), "down": torch.nn.Linear(10, 6)}) for _ in range(2)
        )

    def forward(self, x):
        for block in self:
            x = x + block["down"](F.gelu(block["up"](x)))
        return x


def models():
    torch.manual_seed(0)
    plain = Blocks().double()
    torch.manual_seed(0)
    bases = {
        kind: Basis(*(torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in shape))
        for kind, shape in {"up": (6, 10), "down": (10, 6)}.items()
    }
    truncated = Blocks().double()
    truncated.load_state_dict(plain.state_dict())
    return plain, sparsify(truncated, bases, 9, TARGETS, form="truncated")


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 7, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def assert_same_moments(ours, expected):
    assert ours.keys() == expected.keys()
    for kind, moments in ours.items():
        assert moments.count == expected[kind].count
        for side in ("left", "right"):
            torch.testing.assert_close(getattr(moments, side), getattr(expected[kind], side), rtol=1e-12, atol=1e-14)


def moments_of_autograd(plain):
    expected = {"up": GradientMoments(10, 6), "down": GradientMoments(6, 10)}
    for x in batches():
        plain.zero_grad()
        plain(x).square().sum().backward()
        for block in plain:
            for kind, linear in block.items():
                expected[kind].update(linear.weight.grad)
    return expected


@pytest.mark.parametrize(("whole_batches", "parts"), [(True, 1), (False, 1), (False, 4)])
def test_moments_are_those_of_a_plain_linear_however_a_batch_is_cut(whole_batches, parts):
    plain, truncated = models()
    with GradientCollector(truncated, whole_batches=whole_batches) as collector:
        for x in batches():
            for part in x.chunk(parts):
                truncated(part).square().sum().backward()
            collector.end_batch()
    assert_same_moments(collector.moments, moments_of_autograd(plain))
    truncated(batches()[0]).square().sum().backward()  # outside: nothing is watched
    assert_same_moments(collector.moments, moments_of_autograd(plain))


def test_refreshes_fall_between_the_steps_that_are_asked_for():
    options = RefreshOptions(steps=3, batches=1)
    assert [step for step in range(10) if options.due(step)] == [3, 6, 9]


# In the loop


@pytest.fixture
def train_truncated(config, classifier, random_bases, run_training):
    """``train_truncated(state, ...)``: the truncated form on CoLA with a refresh every 3 steps; the model after it."""

    def make(state, steps=3, **changes):
        found = with_own_choices(config("method=truncated_refreshed"))
        method = build_method(found["method"], found["model"], found["protocol"], bases=random_bases())
        model = method.prepare(classifier())
        refresh = None if state is None else RefreshOptions(steps=steps, batches=2, state=state)
        progress = run_training(model, method.optimizer(model, 1e-3, 0.0), refresh=refresh, **changes)
        return model, progress

    return make


def test_training_renews_the_bases_by_the_gradients_at_that_step(train_truncated, random_bases):
    model, _ = train_truncated("reset", max_steps=4)
    layers = list(sparsegrad_layers(model).values())
    assert all(int(layer.refreshes) == 1 for layer in layers)
    before = random_bases()
    for layer in layers:
        _r, c = layer.ranks
        assert not torch.allclose(layer.basis.U, before[layer.kind].U[:c].to(layer.basis.U))
        assert layer.basis.orthogonality_error() < 1e-5
    kinds = {layer.kind: layer.basis for layer in layers}
    assert all(layer.basis is kinds[layer.kind] for layer in layers)  # shared as before


def test_without_a_refresh_the_bases_stay(train_truncated, random_bases):
    model, _ = train_truncated(None, max_steps=4)
    for layer in sparsegrad_layers(model).values():
        torch.testing.assert_close(layer.basis.U, random_bases()[layer.kind].U[: layer.ranks[1]].to(layer.basis.U))


@pytest.mark.parametrize("state", ["reset", "carry"])
@pytest.mark.parametrize("stop", [2, 5])  # before the first refresh, and between two of them
def test_a_killed_run_goes_on_bit_for_bit_across_a_refresh(stop, state, train_truncated, tmp_path):
    def kill(step, _):
        if step == stop + 1:
            raise InterruptedError

    options = {"max_steps": 10, "evaluation_steps": 1}
    with pytest.raises(InterruptedError):
        train_truncated(state, files=tmp_path, on_evaluation=kill, **options)
    found = [train_truncated(state, files=folder, **options) for folder in (tmp_path, None)]
    assert [progress.resumed for _, progress in found] == [1, 0]
    assert found[0][1].evaluations == found[1][1].evaluations
    one, two = (model.state_dict() for model, _ in found)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_hosvd_of_the_collected_moments_is_what_the_layers_get(train_truncated, monkeypatch):
    from finetune.training import refreshing

    given = []

    def spy(moments):
        given.append(hosvd(moments))
        return given[-1]

    monkeypatch.setattr(refreshing, "hosvd", spy)
    model, _ = train_truncated("reset", max_steps=4)
    for layer in sparsegrad_layers(model).values():
        found = next(b for b in given if b.V.shape[0] == layer.out_features and b.U.shape[0] == layer.in_features)
        torch.testing.assert_close(layer.basis.V, found.V[: layer.ranks[0]].to(layer.basis.V))
