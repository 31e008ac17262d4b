"""bfloat16: float32 masters keep small updates, bases stay orthonormal (D25), autocast gives float32 gradients."""

import copy
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F

from sparsegrad import (
    Basis,
    FoldedLinear,
    RotatedLinear,
    SparseGradAdamW,
    merge,
    param_groups,
    sparsegrad_layers,
    sparsify,
)

OUT, IN, K = 48, 32, 40
FORMS = {"folded": FoldedLinear, "rotated": RotatedLinear}
LAYERS = [pytest.param(f, s, id=f"{f}-{s}") for f in FORMS for s in ("step", "backward")]


class Task:
    """Regression whose rotated gradient has K leading entries far above the rest.

    So both precisions select the same entries, and what differs is how the updates add up.
    """

    def __init__(self, basis):
        generator = torch.Generator().manual_seed(0)
        entries = torch.randperm(OUT * IN, generator=generator)[:K]
        change = torch.zeros(OUT * IN, dtype=torch.float64)
        change[entries] = (1 + torch.rand(K, generator=generator, dtype=torch.float64)) * (-1.0) ** entries
        self.basis = Basis(basis.U.float(), basis.V.float())
        self.start = (0.1 * torch.randn(OUT, IN, generator=generator)).bfloat16()
        self.target = self.start.double() + basis.rotate_back(change.view(OUT, IN))
        self.inputs = [
            torch.linalg.qr(torch.randn(128, IN, generator=generator, dtype=torch.float64)).Q * 128**0.5
            for _ in range(20)
        ]

    def layer(self, form, dtype, select_in="step"):
        basis = Basis(self.basis.U.clone(), self.basis.V.clone())
        return FORMS[form](self.start.to(dtype), None, basis, K, select_in=select_in)

    def train(self, layer, lr=1e-4):
        """The weight in original coordinates, float64, before and after each step."""
        optimizer = SparseGradAdamW(param_groups(layer), lr=lr)
        yield layer.original_weight().double()
        for x in self.inputs:
            optimizer.zero_grad()
            y = layer(x.to(layer.weight.dtype))
            F.mse_loss(y.float(), (x @ self.target.T).float()).backward()
            optimizer.step()
            yield layer.original_weight().double()


@pytest.fixture
def task(random_basis):
    return Task(random_basis(OUT, IN))


def relative_error(change, expected):
    return float((change - expected).norm() / expected.norm())


def train_blocks(model, steps=3, lr=1e-2, dtype=torch.bfloat16):
    optimizer = SparseGradAdamW(param_groups(model), lr=lr)
    for i in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(i)).to(dtype)).float().square().sum().backward()
        optimizer.step()
    return optimizer


# ---- masters ----


@pytest.mark.parametrize(("form", "select_in"), LAYERS)
@pytest.mark.parametrize("cast_later", [False, True], ids=["made in bfloat16", "cast to bfloat16"])
def test_twenty_bfloat16_steps_follow_float32(form, select_in, cast_later, task):
    """The change of the weights, not the weights, agrees to 1e-2; without masters it is lost nearly whole."""
    exact = list(task.train(task.layer(form, torch.float32, select_in)))
    layer = task.layer(form, torch.float32 if cast_later else torch.bfloat16, select_in).bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.master.dtype == torch.float32
    rounded = list(task.train(layer))
    assert relative_error(rounded[-1] - rounded[0], exact[-1] - exact[0]) < 1e-2
    assert torch.equal(layer.weight, layer.master.bfloat16())

    without = task.start.clone()
    for before, after in itertools.pairwise(exact):
        without += (after - before).bfloat16()
    assert relative_error(without.double() - task.start.double(), exact[-1] - exact[0]) > 0.5


@pytest.mark.parametrize("form", FORMS)
def test_masters_exist_for_weights_below_float32_only(form, blocks, block_bases, block_patterns):
    model = sparsify(blocks(dtype=torch.float32), block_bases(), 5, block_patterns, form=form)
    plain_keys = set(model.state_dict())
    layers = sparsegrad_layers(model)
    assert all(layer.master is None for layer in layers.values())
    for low in (torch.bfloat16, torch.float16):
        model.to(low)
        assert all(layer.master.dtype == torch.float32 for layer in layers.values())
        assert set(model.state_dict()) == plain_keys | {f"{name}.master" for name in layers}
        model.float()
        assert all(layer.master is None for layer in layers.values())
        assert set(model.state_dict()) == plain_keys


@pytest.mark.parametrize("form", FORMS)
def test_casting_back_up_continues_from_the_master(form, blocks, block_bases, block_patterns):
    model = sparsify(blocks(dtype=torch.bfloat16), block_bases(), 5, block_patterns, form=form)
    train_blocks(model, lr=1e-4)
    layer = model.layers[0].up
    master, rounded = layer.master.clone(), layer.weight.detach().float()
    assert not torch.equal(master, rounded)
    model.float()
    assert torch.equal(layer.weight, master)
    train_blocks(model, steps=1, lr=0.0, dtype=torch.float32)
    assert torch.equal(layer.weight, master)


@pytest.mark.parametrize("form", FORMS)
def test_masters_follow_deepcopy_and_state_dict(form, blocks, block_bases, block_patterns):
    def build(seed):
        return sparsify(blocks(dtype=torch.bfloat16, seed=seed), block_bases(seed), 5, block_patterns, form=form)

    model = build(0)
    train_blocks(model, lr=1e-4)
    loaded = build(1)
    loaded.load_state_dict(model.state_dict())
    for other in (loaded, copy.deepcopy(model)):
        for name, layer in sparsegrad_layers(other).items():
            original = model.get_submodule(name)
            assert torch.equal(layer.master, original.master) and layer.master is not original.master
            assert torch.equal(layer.original_weight(), original.original_weight())


@pytest.mark.parametrize("form", FORMS)
def test_a_master_is_no_part_of_a_graph_and_lets_go_of_the_linear(form, random_basis):
    linear = torch.nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer = FORMS[form](linear.weight, linear.bias, random_basis(OUT, IN, dtype=torch.float32), K)
    assert not layer.master.requires_grad and layer.master.is_leaf
    weight = weakref.ref(linear.weight)
    del linear
    assert weight() is None


@pytest.mark.parametrize("form", FORMS)
def test_merging_rounds_the_master_once(form, blocks, block_bases, block_patterns):
    model = sparsify(blocks(dtype=torch.bfloat16), block_bases(), 5, block_patterns, form=form)
    train_blocks(model)
    masters = {name: layer.original_weight() for name, layer in sparsegrad_layers(model).items()}
    merge(model)
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(model.get_submodule(name).weight, master.bfloat16())


# ---- bases ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_basis_orthonormal(form, dtype, blocks, block_bases, block_patterns):
    """D25: the released code rounds its bases, the control, and they are orthogonal no longer."""
    model = sparsify(blocks(dtype=torch.float32), block_bases(), 5, block_patterns, form=form)
    basis = model.layers[0].up.basis
    before = basis.U.clone(), basis.V.clone()
    for cast in (lambda: model.to(dtype), lambda: model.to("cpu", dtype), model.float):
        cast()
        assert torch.equal(basis.U, before[0]) and torch.equal(basis.V, before[1])
    assert basis.orthogonality_error() < 1e-6
    assert Basis(basis.U.to(dtype).float(), basis.V.to(dtype).float()).orthogonality_error() > 1e-4
    model.double()
    assert basis.U.dtype == basis.V.dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_weights_get_a_float32_basis(form, blocks, block_bases, block_patterns):
    model = sparsify(blocks(dtype=torch.bfloat16), block_bases(), 5, block_patterns, form=form)
    assert model.layers[0].up.basis.U.dtype == torch.float32
    assert model.layers[0].up.basis.orthogonality_error() < 1e-6


# ---- autocast ----


@pytest.mark.parametrize(("form", "select_in"), LAYERS)
@pytest.mark.parametrize("no_basis", [False, True], ids=["basis", "no_basis"])
def test_autocast_trains_with_float32_gradients(form, select_in, no_basis, blocks, block_bases, block_patterns):
    bases = None if no_basis else block_bases()
    model = sparsify(blocks(dtype=torch.float32), bases, 20, block_patterns, form=form, select_in=select_in)
    optimizer, x = SparseGradAdamW(param_groups(model), lr=1e-2), torch.randn(16, 8)
    seen, losses = [], []
    hooks = [m.register_forward_hook(lambda m, i, y: seen.append(y.dtype)) for m in sparsegrad_layers(model).values()]
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        for layer in sparsegrad_layers(model).values():
            layer.select()
            assert layer.selected_gradient()[1].dtype == torch.float32
            assert layer.bias.grad.dtype == torch.float32
        optimizer.step()
        losses.append(loss.item())
    assert set(seen) == {torch.bfloat16} and len(seen) == 10 * len(hooks)
    assert losses[-1] < 0.5 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(layer.master is None for layer in sparsegrad_layers(model).values())


@pytest.mark.parametrize(("form", "select_in"), LAYERS)
def test_autocast_gives_linears_function_and_gradient_to_bfloat16(form, select_in, task):
    """Every entry is kept, so that the whole gradient is compared."""
    linear = torch.nn.Linear(IN, OUT)
    layer = FORMS[form](linear.weight, linear.bias, task.basis, OUT * IN, select_in=select_in)
    x = task.inputs[0].float()
    outputs = []
    for module in (layer, linear):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(module(x))
        outputs[-1].float().sin().sum().backward()
        outputs[-1] = outputs[-1].detach()
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert relative_error(outputs[0].float(), outputs[1].float()) < (1e-6 if form == "folded" else 1e-2)
    G = task.basis.rotate_back(layer.take_gradient()[1].view(OUT, IN))
    assert relative_error(G, linear.weight.grad) < 2e-2
    assert relative_error(layer.bias.grad, linear.bias.grad) < 2e-2


@pytest.mark.parametrize(("form", "select_in"), LAYERS)
def test_autocast_leaves_float64_alone_as_linear_does(form, select_in, random_basis):
    linear = torch.nn.Linear(IN, OUT, dtype=torch.float64)
    layer = FORMS[form](linear.weight, linear.bias, random_basis(OUT, IN), K, select_in=select_in)
    x = torch.randn(3, IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), linear(x))
