"""What several test modules of the library share: random bases, blocks of MLPs, tiny transformers, the patterns."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from sparsegrad import Basis, SparseGradAdamW, find_targets, param_groups, sparsify

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CONF = Path(__file__).parents[2] / "conf" / "model"


class Block(nn.Module):
    """A residual MLP with a norm: SparseGrad weights, biases and LayerNorm in one place."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(n))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _same_seed_for_every_test():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cuda_tests_need_a_device(request):
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def random_basis():
    """``random_basis(out_features, in_features, seed, dtype)``: two random orthogonal matrices."""

    def make(out_features, in_features, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        V, U = (
            torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
            for n in (out_features, in_features)
        )
        return Basis(U.to(dtype), V.to(dtype))

    return make


@pytest.fixture
def block_patterns():
    return {"up": r"layers\.(?P<layer>\d+)\.up", "down": r"layers\.(?P<layer>\d+)\.down"}


@pytest.fixture
def blocks():
    """``blocks(dtype=..., n=...)``: a plain stack of residual MLPs."""

    def make(dtype=torch.float64, seed=0, n=2):
        torch.manual_seed(seed)
        return Blocks(n).to(dtype)

    return make


@pytest.fixture
def block_bases(random_basis):
    """``block_bases(seed, dtype)``: one basis a kind for ``blocks()``."""

    def make(seed=0, dtype=torch.float64):
        return {"up": random_basis(12, 8, 2 * seed, dtype), "down": random_basis(8, 12, 2 * seed + 1, dtype)}

    return make


@pytest.fixture(scope="session")
def model_conf():
    """``model_conf(name)``: conf/model/<name>.yaml as a dictionary."""
    return lambda name: yaml.safe_load((CONF / f"{name}.yaml").read_text())


@pytest.fixture(scope="session")
def hub_model(model_conf):
    """``hub_model(name, **sizes)``: a transformers model with random weights from the architecture in conf/model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    def make(name, **sizes):
        config = AutoConfig.for_model(**(model_conf(name)["architecture"] | sizes))
        auto = AutoModelForCausalLM if config.model_type == "llama" else AutoModelForSequenceClassification
        return auto.from_config(config)

    return make


@pytest.fixture
def tiny_transformer(hub_model, model_conf):
    """``tiny_transformer("bert" | "roberta" | "llama")``: a model, its patterns and an input, in float64."""
    small = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    families = {
        "bert": ("bert_base", {"num_hidden_layers": 2}),
        "roberta": ("roberta_base", {"num_hidden_layers": 2}),
        "llama": ("llama2_7b", {"num_hidden_layers": 4, "num_key_value_heads": 2}),
    }

    def make(family, dtype=torch.float64, **sizes):
        name, own = families[family]
        torch.manual_seed(0)
        model = hub_model(name, **(small | own | sizes)).to(dtype).eval()
        tokens = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
        return model, model_conf(name)["target_modules"], tokens

    return make


@pytest.fixture
def transformer_bases(random_basis):
    """``transformer_bases()``: bases for ``tiny_transformer`` of the standard size."""
    return lambda: {"up": random_basis(24, 16), "down": random_basis(16, 24, 1)}


@pytest.fixture
def trained(tiny_transformer, transformer_bases):
    """``trained(family, form, **options)``: a model after some steps, its optimizer and its sparsify options."""

    def make(family="bert", form="folded", basis="full", dense=True, dtype=torch.float64, steps=3):
        model, patterns, tokens = tiny_transformer(family, dtype=dtype)
        full = transformer_bases()
        bases = {"full": full, "leading": {kind: b.leading(6, 5) for kind, b in full.items()}, "none": None}[basis]
        if not dense:
            model.requires_grad_(False)
            for target in find_targets(model, patterns):
                target.module.weight.requires_grad_(True)
        config = {"k": {"up": 7, "down": 9}, "target_modules": patterns, "form": form}
        if family == "llama":
            config["layers_to_transform"] = [0, 3]
        sparsify(model, bases, **config)
        optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.log_softmax(model(input_ids=tokens).logits.float(), -1)[..., 0].square().sum().backward()
            optimizer.step()
        return model, optimizer, config

    return make
