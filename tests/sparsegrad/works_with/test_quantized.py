"""Linears that bitsandbytes, torchao and optimum-quanto have quantised: a truncated core trains beside them."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsegrad import (
    QuantizedTruncatedLinear,
    SparseGradAdamW,
    load_adapter,
    merge,
    param_groups,
    save_adapter,
    sparsegrad_layers,
    sparsify,
)

PATTERNS = {"up": "up", "down": "down"}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Packed(torch.Tensor):
    """Bytes and a scale that behave as one tensor of floats, as torchao's do."""

    @staticmethod
    def __new__(cls, bytes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, bytes.shape, dtype=scale.dtype)

    def __init__(self, bytes, scale):
        self.bytes, self.scale = bytes, scale

    def __tensor_flatten__(self):
        return ["bytes", "scale"], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return func(args[0], args[1].bytes.float() * args[1].scale, *args[2:])
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            args[0].bytes, args[0].scale = args[1].bytes.clone(), args[1].scale.clone()
            return args[0]
        assert func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default), func
        return cls(args[0].bytes.clone(), args[0].scale.clone())


def packed(model):
    for linear in (model.up, model.down):
        scale = linear.weight.detach().abs().max() / 127
        bytes = (linear.weight.detach() / scale).round().to(torch.int8)
        linear.weight = nn.Parameter(Packed(bytes, scale), requires_grad=False)


def torchao(model, bits):
    # Its kernels for cards, which it fails to load on a CPU, and a deprecation inside of it.
    quantization = pytest.importorskip("torchao.quantization")
    integers = {
        8: quantization.Int8WeightOnlyConfig,
        4: partial(quantization.IntxWeightOnlyConfig, weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
    }
    quantization.quantize_(model, integers[bits]())


def bitsandbytes(model, kind, **options):
    made = getattr(pytest.importorskip("bitsandbytes").nn, kind)
    for name, linear in (("up", model.up), ("down", model.down)):
        quantised = made(linear.in_features, linear.out_features, **options)
        quantised.load_state_dict(linear.state_dict())
        setattr(model, name, quantised.to("cpu"))


def quanto(model, bits):
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights={8: library.qint8, 4: library.qint4}[bits])
    library.freeze(model)


WAYS = {
    "packed": packed,
    "torchao int8": partial(torchao, bits=8),
    "torchao int4": partial(torchao, bits=4),
    "bitsandbytes 8": partial(bitsandbytes, kind="Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes 4": partial(bitsandbytes, kind="Linear4bit", compute_dtype=torch.float32),
    "quanto int8": partial(quanto, bits=8),
    "quanto int4": partial(quanto, bits=4),
}


@pytest.fixture
def bases(random_basis):
    return {"up": random_basis(64, 32, dtype=torch.float32), "down": random_basis(32, 64, 1, torch.float32)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_core_trains_beside_a_quantised_weight(way, bases, tmp_path):
    """The gradient is the leading block of what a linear with the weight's values has; merge and adapter follow."""
    model, x = Mlp(), torch.randn(16, 32)
    WAYS[way](model)
    again = copy.deepcopy(model) if "quanto" not in way else None  # its tensors can't be copied
    before = model(x)
    with pytest.raises(ValueError, match=r"up: the weight is quantised .* use form='truncated'"):
        sparsify(model, bases, 64, PATTERNS)
    sparsify(model, bases, 64, PATTERNS, form="truncated")
    assert all(type(layer) is QuantizedTruncatedLinear for layer in sparsegrad_layers(model).values())
    assert torch.equal(model(x), before)

    plain = Mlp()
    for name, layer in sparsegrad_layers(model).items():
        getattr(plain, name).weight.data = layer.original_weight()
        getattr(plain, name).bias.data = layer.bias.detach().clone()
    for net in (model, plain):
        net(x).square().mean().backward()
    for name, layer in sparsegrad_layers(model).items():
        G_rot = bases[name].rotate(getattr(plain, name).weight.grad)[:8, :8]
        torch.testing.assert_close(layer.core.grad, G_rot, rtol=2e-2, atol=2e-3 * G_rot.abs().max().item())

    held = [layer.original_weight() for layer in sparsegrad_layers(model).values()]
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4  # cores and biases, no weight
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(model(x).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all((w - v.original_weight()).any() for w, v in zip(held, sparsegrad_layers(model).values(), strict=True))

    trained = model(x)
    save_adapter(tmp_path / "adapter.safetensors", model)
    if again is not None:
        load_adapter(tmp_path / "adapter.safetensors", again)
        torch.testing.assert_close(again(x), trained, rtol=1e-5, atol=1e-5)
    merge(model)
    assert type(model.up) is nn.Linear
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_weight_of_several_tensors_is_told_apart_by_what_they_hold(bases, tmp_path):
    one, other = Mlp(), Mlp()
    for model in (one, other):
        packed(model)
    sparsify(one, bases, 64, PATTERNS, form="truncated")
    save_adapter(tmp_path / "adapter.safetensors", one)
    with pytest.raises(ValueError, match=r"another base model: .*up\.weight"):
        load_adapter(tmp_path / "adapter.safetensors", other)


@pytest.mark.parametrize("way", ["packed", "bitsandbytes 8"])
@pytest.mark.filterwarnings("ignore")
def test_its_state_is_its_own_and_no_plain_models(way, bases):
    model, x = Mlp(), torch.randn(4, 32)
    WAYS[way](model)
    plain = copy.deepcopy(model)
    sparsify(model, bases, 64, PATTERNS, form="truncated")
    twin = copy.deepcopy(model)
    torch.nn.init.normal_(model.up.core)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for up.weight"):
        plain.load_state_dict(state, strict=False)
    twin.load_state_dict(state)
    assert torch.equal(twin(x), model(x))
