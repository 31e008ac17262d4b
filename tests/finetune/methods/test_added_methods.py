"""A method is one module and one YAML file, or a file alone: it trains, merges, is in the catalogue and the plan."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune.methods import base_method, build_method, needs_bases
from finetune.methods.base import Configuration, count_parameters
from finetune.methods.costs import Operations
from finetune.methods.lora import LoRA
from finetune.methods.peft import PEFT
from finetune.plan.estimate import plan_experiment
from finetune.plan.experiment import Experiment
from finetune.plan.text import plan_text
from finetune.plan.throughput import Processor
from finetune.store.catalog import read_methods
from finetune.store.experiment import expand
from finetune.training.losses import summed_loss
from sparsegrad import SparseGradAdamW

ROOT = Path(__file__).parents[3]
SHAPE = (64, 32)

ROWS = '''
"""Every other row of a matrix trains."""
from dataclasses import dataclass
import torch
from finetune.methods.base import Method

@dataclass(frozen=True)
class EveryOtherRow(Method):
    every: int = 2

    @classmethod
    def from_config(cls, config):
        return cls(config.targets, config.method["every"])

    def prepare(self, model):
        for target in self.targets.set_trainable(model):
            kept = (torch.arange(target.module.out_features) % self.every == 0)[:, None]
            target.module.weight.register_hook(lambda gradient, kept=kept: gradient * kept)
        return model

    def entries(self, shape):
        return -(-shape[0] // self.every) * shape[1]
'''
RULE = '''
"""The first k entries, whatever they are."""
import torch

def first(gradient, k):
    return torch.arange(k)
'''
ADDED = {
    "rows": {"base": "added.rows", "every": 2},
    "first": {"base": "sparsegrad", "form": "folded", "matmul": "regular", "select": "added.rule.first"},
    "dora": {"label": "DoRA", "base": "peft", "config": "LoraConfig", "arguments": {"use_dora": True}},
    "loha": {"base": "peft", "config": "LoHaConfig", "arguments": {"r": 2, "alpha": 4}},
}


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A copy of ``conf`` with the added methods' files, and their modules on the path."""
    folder = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    package = tmp_path / "code" / "added"
    package.mkdir(parents=True)
    (package / "rows.py").write_text(ROWS)
    (package / "rule.py").write_text(RULE)
    monkeypatch.syspath_prepend(package.parent)
    for name, content in ADDED.items():
        text = yaml.safe_dump({"name": name, "label": name.title()} | content)
        (folder / "method" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def made(conf, config):
    """``made("rows")``: the method of an added file, composed as a script composes it."""

    def make(name, bases=None):
        with initialize_config_dir(str(conf), version_base=None):
            group = OmegaConf.to_container(compose("glue", [f"method={name}"]), resolve=True)["method"]
        found = config()
        return build_method(group, found["model"], found["protocol"], bases=bases, one_backward_a_step=True)

    return make


@pytest.mark.parametrize("name", ADDED)
def test_an_added_method_trains_and_merges(name, made, classifier, load, random_bases):
    method, plain = made(name, random_bases() if name == "first" else None), classifier(dropout=False)
    counted = count_parameters(classifier(), method)
    model = method.prepare(classifier(dropout=False))
    optimizer = method.optimizer(model, 1e-2, 0.0)
    batch = load("cola")[1]["train"].batch(range(16))
    labels = batch.pop("labels")
    losses = []
    for _ in range(3):
        loss = summed_loss(model(**batch).logits, labels) / 16
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    expected = model.eval()(**batch).logits
    merged = method.merge(model)
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-5)
    assert list(merged.state_dict()) == list(plain.state_dict())
    targets = method.targets.find(merged)
    moved = [t.module.weight - plain.get_submodule(t.name).weight for t in targets]
    assert all(delta.abs().max() > 0 for delta in moved)
    if name == "rows":
        assert all((delta[1::2] == 0).all() for delta in moved)
        assert counted["trainable_per_layer"] == 64 * 32 / 2
    elif name == "first":
        assert isinstance(optimizer, SparseGradAdamW)
        for target, delta in zip(targets, moved, strict=True):
            rotated, k = random_bases()[target.kind].rotate(delta.detach()).flatten(), method.entries(SHAPE)
            assert rotated[:k].abs().median() > 1e-3 and rotated[k:].abs().max() < 1e-4


def test_added_methods_are_in_the_catalogue_and_the_plan(conf, tmp_path):
    found = read_methods(conf)
    assert {found[name].label for name in ADDED} == {"Rows", "First", "DoRA", "Loha"}

    def read(group, name):
        return yaml.safe_load((conf / group / f"{name}.yaml").read_text())

    lists = yaml.safe_load((ROOT / "experiments/base.yaml").read_text())
    lists |= {
        "name": "e",
        "models": ["bert_base"],
        "tasks": ["rte"],
        "seeds": [1],
        "decoders": ["stories260k"],
        "scale": "paper",
    }
    lists = expand(lists | {"methods": ["full", "lora", *ADDED], "efficiency_models": []}, conf)
    settings = {k: v for k, v in read("", "plan").items() if k not in ("hydra", "data_root")}
    cards = [Processor(name=name, **values) for name, values in settings["cards"].items()]
    plan = plan_experiment(Experiment(lists, read, settings, tmp_path, str(tmp_path)), cards, settings)
    json.dumps(plan)
    seconds = {
        row["method"]: row["cards"]["A40"]["seconds"] for row in plan["stages"] if row["stage"] == "train" and
        row["model"] == "bert_base"
    }  # fmt: skip
    assert seconds.keys() == {"full", "lora", *ADDED} and seconds["lora"] < seconds["dora"] and seconds["rows"] > 0
    memory = {(row["model"], row["method"]): row for row in plan["memory"]}
    for model in ("bert_base", "stories260k"):
        share = {method: memory[model, method]["share"] for method in ("full", "lora", *ADDED)}
        assert share["lora"] < share["dora"] < share["rows"] < share["full"]
        assert memory[model, "dora"]["components"]["gradients"] < memory[model, "rows"]["components"]["gradients"]
    text = plan_text(plan, [])
    assert all(name in text for name in ADDED)


# PEFT


def peft(config, arguments, rank=3):
    group = {"name": "mine", "base": "peft", "config": config, "arguments": arguments}
    protocol = {"lora_scale": 2.0, "density": None}
    return PEFT.from_config(Configuration(group, {"lora_rank": rank}, protocol, None))


def test_costs_that_are_counted_are_those_by_formula():
    lora = LoRA(None, arguments={"r": 3})
    counted = peft("LoraConfig", {})
    assert counted.entries(SHAPE) == lora.entries(SHAPE) == 3 * (64 + 32)
    assert counted.operations(SHAPE) == lora.operations(SHAPE) == Operations(6.0 * 3 * (64 + 32))
    dora = peft("LoraConfig", {"use_dora": True})
    assert dora.entries(SHAPE) == 3 * (64 + 32) + 64  # a magnitude for each output
    assert dora.operations(SHAPE).step >= 2 * 3 * 64 * 32  # the product of both factors, for the norm
    assert peft("ShiraConfig", {"r": 4}).entries(SHAPE) == 4 * (64 + 32)  # it looks at values: counted on real ones


def test_loras_family_takes_rank_and_scale_from_model_and_protocol():
    assert peft("LoraConfig", {}).arguments == {"r": 3, "lora_alpha": 6.0, "lora_dropout": 0.0}
    assert peft("LoraConfig", {"r": 5, "use_dora": True}).arguments["lora_alpha"] == 10.0
    assert peft("LoHaConfig", {"r": 2}).arguments == {"r": 2}


@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        ("NoConfig", {}, r"method.config='NoConfig'; peft .* wraps layers by: .*LoraConfig"),
        ("PromptTuningConfig", {}, "method.config='PromptTuningConfig'; peft"),
        ("LoHaConfig", {"rang": 2}, "peft's LoHaConfig with {'rang': 2} refuses these matrices: .*rang"),
        ("C3AConfig", {"block_size": 7}, "peft's C3AConfig with .* refuses these matrices"),
        ("LoraConfig", {"r": 33}, "lora_rank=33; allowed: 1 to 32"),
    ],
)
def test_a_class_that_peft_lacks_or_that_can_not_wrap_is_refused(kind, arguments, text, classifier, build):
    with pytest.raises(ValueError, match=text):
        method = peft(kind, arguments)
        PEFT(build("full").targets, method.config, method.arguments).prepare(classifier())


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (
            {"base": "nothing"},
            "method='nothing'; allowed: full, lora, meprop, peft, random_entries, sparsegrad, or the dotted path",
        ),
        ({"base": "no.such.module"}, "method='no.such.module'; allowed"),
        ({"base": "finetune.methods.costs"}, "method='finetune.methods.costs'; allowed"),  # holds no method
        ({"base": "base"}, "method='base'; allowed"),
    ],
)
def test_a_base_that_is_no_method_is_refused(group, text):
    with pytest.raises(ValueError, match=text):
        base_method({"name": "mine"} | group)
    assert needs_bases({"name": "sparsegrad"}) and not needs_bases({"name": "mine", "base": "peft"})


def test_a_rule_that_is_not_there_is_refused(config, random_bases):
    found = config("method=sparsegrad")
    with pytest.raises(ValueError, match="method.select='sparsegrad.select.nothing'.*give a function as package"):
        group = found["method"] | {"select": "sparsegrad.select.nothing"}
        build_method(group, found["model"], found["protocol"], bases=random_bases())
