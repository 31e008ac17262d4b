"""bfloat16: float32 masters keep small updates, bases stay orthonormal (D25), autocast gives float32 gradients."""

import copy
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from literal import train

from sparsegrad import (
    Basis,
    FoldedLinear,
    RotatedLinear,
    SparseGradAdamW,
    TruncatedLinear,
    param_groups,
    sparsegrad_layers,
    sparsify,
)

OUT, IN, K = 48, 32, 40
FORMS = {"folded": FoldedLinear, "rotated": RotatedLinear}
EVERY = FORMS | {"truncated": TruncatedLinear}
SELECTING = [(form, {"select_in": where}) for form in FORMS for where in ("step", "backward")]


class Task:
    """Regression whose rotated gradient has its K leading entries in the first 8 x 5 far above the rest.

    So both precisions and all forms select the same entries, and what differs is how the updates add up.
    """

    def __init__(self, basis):
        generator = torch.Generator().manual_seed(0)
        change = torch.zeros(OUT, IN, dtype=torch.float64)
        change[:8, :5] = 1 + torch.rand(8, 5, generator=generator, dtype=torch.float64)
        change[::2] *= -1
        self.basis = Basis(basis.U.float(), basis.V.float())
        self.start = (0.1 * torch.randn(OUT, IN, generator=generator)).bfloat16()
        self.target = self.start.double() + basis.rotate_back(change)
        self.inputs = [
            torch.linalg.qr(torch.randn(128, IN, generator=generator, dtype=torch.float64)).Q * 128**0.5
            for _ in range(20)
        ]

    def layer(self, form, dtype, **options):
        basis = Basis(self.basis.U.clone(), self.basis.V.clone())
        return EVERY[form](self.start.to(dtype), None, basis, K, **options)

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
    train(model, SparseGradAdamW(param_groups(model), lr=lr), range(steps), dtype)


# ---- masters ----


@pytest.mark.parametrize(("form", "options"), [*SELECTING, ("truncated", {"ranks": (8, 5)})])
@pytest.mark.parametrize("cast_later", [False, True], ids=["made in bfloat16", "cast to bfloat16"])
def test_twenty_bfloat16_steps_follow_float32(form, options, cast_later, task):
    """The change of the weights, not the weights, agrees to 1e-2; rounded at each step it is lost nearly whole."""
    exact = list(task.train(task.layer(form, torch.float32, **options)))
    layer = task.layer(form, torch.float32 if cast_later else torch.bfloat16, **options).bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    rounded = list(task.train(layer))
    assert relative_error(rounded[-1] - rounded[0], exact[-1] - exact[0]) < 1e-2
    assert cast_later or relative_error(rounded[0], task.start.double()) < 1e-6  # W_rot is not rounded either
    if form == "truncated":
        assert layer.update == "side" and layer.core.dtype == torch.float32 and torch.equal(layer.weight, task.start)
    else:
        assert layer.master.dtype == torch.float32 and torch.equal(layer.weight, layer.master.bfloat16())
    assert torch.equal(layer.to_linear().weight, layer.original_weight().bfloat16())  # rounded once

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
    assert layer.basis.U.dtype == torch.float32 and layer.basis.orthogonality_error() < 1e-6
    master, rounded = layer.master.clone(), layer.weight.detach().float()
    assert not torch.equal(master, rounded)
    model.float()
    assert torch.equal(layer.weight, master)
    train_blocks(model, steps=1, lr=0.0, dtype=torch.float32)
    assert torch.equal(layer.weight, master)


@pytest.mark.parametrize("form", FORMS)
def test_masters_follow_deepcopy(form, blocks, block_bases, block_patterns):
    model = sparsify(blocks(dtype=torch.bfloat16), block_bases(), 5, block_patterns, form=form)
    train_blocks(model, lr=1e-4)
    for name, layer in sparsegrad_layers(copy.deepcopy(model)).items():
        original = model.get_submodule(name)
        assert torch.equal(layer.master, original.master) and layer.master is not original.master


@pytest.mark.parametrize("form", FORMS)
def test_a_master_is_no_part_of_a_graph_and_lets_go_of_the_linear(form, random_basis):
    linear = torch.nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer = FORMS[form](linear.weight, linear.bias, random_basis(OUT, IN, dtype=torch.float32), K)
    assert not layer.master.requires_grad and layer.master.is_leaf
    weight = weakref.ref(linear.weight)
    del linear
    assert weight() is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["all", "weights alone", "in place", "after some steps"])
def test_masters_follow_what_is_loaded(form, how, blocks, block_bases, block_patterns):
    """Else the next step would bring back the weights from before."""
    model, other = (
        sparsify(blocks(torch.bfloat16, seed), block_bases(), 5, block_patterns, form=form) for seed in (0, 1)
    )
    train_blocks(other, lr=1e-4)
    train_blocks(model, steps=2 if how == "after some steps" else 0)
    state = other.state_dict()
    if how == "weights alone":
        state = {name: tensor for name, tensor in state.items() if not name.endswith("master")}
    if how == "in place":
        for name, tensor in model.state_dict().items():
            if not name.endswith("master"):
                tensor.copy_(state[name])
    else:
        model.load_state_dict(state, strict=how != "weights alone")
    exact = how in ("all", "after some steps")
    train_blocks(model, steps=1, lr=0.0)
    for name, layer in sparsegrad_layers(model).items():
        expected = other.get_submodule(name)
        assert torch.equal(layer.weight, expected.weight) and torch.equal(layer.master.bfloat16(), expected.weight)
        assert not exact or torch.equal(layer.master, expected.master)


@pytest.mark.parametrize("fused", [False, True])
def test_dense_masters_follow_what_is_loaded(fused, blocks, block_bases, block_patterns):
    """And stay what they are where the state that is loaded is their own."""
    model = sparsify(blocks(torch.bfloat16), block_bases(), 5, block_patterns)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-4, fused=fused)
    train(model, optimizer, range(3), torch.bfloat16)
    saved = copy.deepcopy(model.state_dict())
    masters = {name: optimizer.state[p]["master"].clone() for name, p in model.head.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model.load_state_dict(saved)
    train(model, optimizer, range(3, 4), torch.bfloat16)
    for name, parameter in model.head.named_parameters():
        assert torch.equal(optimizer.state[parameter]["master"], masters[name])
    model.load_state_dict(blocks(torch.bfloat16, seed=1).state_dict(), strict=False)
    head = model.head.weight.detach().clone()
    train(model, optimizer, range(4, 5), torch.bfloat16)
    assert torch.equal(model.head.weight, head) and torch.equal(
        optimizer.state[model.head.weight]["master"], head.float()
    )


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


# ---- autocast ----


CORES = [("truncated", {"ranks": (8, 5), "update": update}) for update in ("in_place", "side")]


@pytest.mark.parametrize(
    ("form", "options", "rotates"),
    [(*case, r) for case in SELECTING for r in (True, False)] + [(*c, True) for c in CORES],
)
def test_autocast_gives_linears_function_and_gradient_to_bfloat16(form, options, rotates, task):
    """Every entry is kept, so that the whole gradient is compared; float64 is left alone, as linear leaves it."""
    linear = torch.nn.Linear(IN, OUT)
    layer = EVERY[form](linear.weight, linear.bias, task.basis if rotates else None, OUT * IN, **options)
    x = task.inputs[0].float()
    outputs = []
    for module in (layer, linear):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(module(x))
        outputs[-1].float().sin().sum().backward()
        outputs[-1] = outputs[-1].detach()
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert relative_error(outputs[0].float(), outputs[1].float()) < (1e-6 if form == "folded" else 1e-2)
    G_rot = task.basis.rotate(linear.weight.grad) if rotates else linear.weight.grad
    G_rot = G_rot[:8, :5] if form == "truncated" else G_rot
    values = layer.take_gradient()[1]
    assert values.dtype == layer.bias.grad.dtype == torch.float32
    assert relative_error(values.view_as(G_rot), G_rot) < 2e-2
    assert relative_error(layer.bias.grad, linear.bias.grad) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.double()(x.double()), linear.double()(x.double()), rtol=0, atol=1e-5)
