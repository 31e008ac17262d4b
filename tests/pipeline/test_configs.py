"""Configurations: every choice composes, experiments name what exists, pins agree."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune.methods import base_method, with_own_choices
from finetune.store.experiment import read_experiment
from sparsegrad import entries_for_density

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
METHODS = {"full", "lora", "meprop", "random_entries", "sparsegrad"}
GROUPS = ("data", "model", "method", "protocol", "scale")
EXPERIMENTS = ("smoke", "local", "paper", "paper_released")


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides, entry="glue"):
    with initialize_config_dir(str(CONF), version_base=None):
        return OmegaConf.to_container(compose(entry, list(overrides)), resolve=True)


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def default():
    return composed()


@pytest.fixture(params=EXPERIMENTS)
def experiment(request):
    return read_experiment(ROOT / "experiments" / f"{request.param}.yaml")


# Groups


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in names(group)])
def test_a_choice_changes_its_own_group_and_nothing_else(group, name, default):
    """So that all choices of all groups compose with each other."""
    found = composed(f"{group}={name}")
    own = {group} | ({"threads", "wandb"} if group == "scale" else set())
    assert {key for key in found if found[key] != default.get(key)} <= own and found.keys() == default.keys()
    assert found[group]["name"] == name


def test_the_methods_are_those_of_the_code_and_variants_of_them():
    found = {name: read(f"conf/method/{name}.yaml") for name in names("method")}
    assert {name for name, content in found.items() if "base" not in content} == METHODS
    for name, content in found.items():
        assert base_method(content) in METHODS | {"peft"}, name
        for protocol in names("protocol"):
            with_own_choices({"method": content, "protocol": read(f"conf/protocol/{protocol}.yaml")})


def test_values_of_k_are_shares_of_the_width_that_the_paper_states_them_for():
    """Tables 11 and 12: k at BERT's 3072 x 768."""
    for thousands in (18, 22, 30, 100):
        density = read(f"conf/method/sparsegrad_{thousands}k.yaml")["protocol"]["density"]
        assert entries_for_density(density, (3072, 768)) == 1000 * thousands


@pytest.mark.parametrize(
    "group",
    [
        "protocol",
        "scale",
        "protocol/llama",
        "scale/llama",
        "scale/efficiency",
        "scale/energy",
        "scale/hosvd_cost",
        "scale/cost_curves",
        "chat",
        "questions",
        "judge",
    ],
)
def test_choices_of_a_group_name_the_same_keys(group):
    """No default hides in code: what one protocol says, every protocol says."""
    keys = {name: set(read(f"conf/{group}/{name}.yaml")) for name in names(group)}
    assert all(found == keys[names(group)[0]] for found in keys.values()), keys


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")) + sorted((ROOT / "experiments").glob("*.yaml")), ids=str)
def test_primary_files_begin_by_saying_what_they_are(path):
    assert path.read_text().startswith("# ")


DECODERS = [name for name in names("model") if "template" in read(f"conf/model/{name}.yaml")]


@pytest.mark.parametrize("name", [name for name in names("model") if name not in DECODERS])
def test_patterns_find_two_matrices_a_block_and_k_and_rank_fit_them(name):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from sparsegrad import find_targets

    config = read(f"conf/model/{name}.yaml")
    with torch.device("meta"):
        architecture = AutoConfig.for_model(**config["architecture"], num_labels=2)
        model = AutoModelForSequenceClassification.from_config(architecture)
    found = find_targets(model, config["target_modules"], config["layers_to_transform"])
    assert len(found) == 2 * architecture.num_hidden_layers
    shapes = {target.kind: tuple(target.module.weight.shape) for target in found}
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    assert shapes == {"up": (inner, hidden), "down": (hidden, inner)}
    assert 0.01 <= config["k"] / (hidden * inner) <= 0.013  # D1: 1.187 % and 1.192 % in the released code
    assert 1 <= config["lora_rank"] <= hidden


# Decoders


@pytest.mark.parametrize("name", DECODERS)
def test_patterns_of_a_decoder_find_the_blocks_of_index_divisible_by_3(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsegrad import find_targets

    config = read(f"conf/model/{name}.yaml")
    with torch.device("meta"):
        architecture = AutoConfig.for_model(**config["architecture"])
        model = AutoModelForCausalLM.from_config(architecture)
    patterns = config["target_modules"] | config.get("optional_modules", {})
    found = find_targets(model, patterns, config["layers_to_transform"])
    blocks = range(0, architecture.num_hidden_layers, 3)  # paper, section 4.3
    assert sorted((target.kind, target.layer) for target in found) == sorted((k, i) for k in patterns for i in blocks)
    if architecture.model_type == "llama":
        assert {target.name for target in found} == {f"model.layers.{i}.mlp.{k}_proj" for k in patterns for i in blocks}
    size = architecture.hidden_size * architecture.intermediate_size
    assert 0.002 <= config["k"] / size <= 0.01


# Experiments


def test_seeds_of_the_report_are_several_and_none_is_the_searchs(experiment):
    assert len(experiment["seeds"]) == len(set(experiment["seeds"])) >= 3
    assert read(f"conf/protocol/{experiment['protocol']}.yaml")["search_seed"] not in experiment["seeds"]


def test_a_search_has_trials_for_all_its_points(experiment):
    sizes = read(f"conf/scale/{experiment['scale']}.yaml")["search"]
    points = sizes["points"]
    assert sizes["trials"] >= max(map(len, points.values() if isinstance(points, dict) else [points]))


def test_the_smoke_experiment_is_not_committed_as_done():
    # As committed: on this machine it may well have been run.
    found = subprocess.run(["git", "-C", ROOT, "show", "HEAD:dvc.lock"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip("no dvc.lock is committed")
    assert "@smoke" not in found.stdout


# Pins


def pins(lines):
    return sorted(
        line.strip().removeprefix("- ") for line in lines if "==" in line and not line.strip().startswith("#")
    )


def test_conda_and_pip_have_the_same_pins():
    locked = pins((ROOT / "requirements.lock").read_text().splitlines())
    (conda,) = [entry["pip"] for entry in read("environment.yml")["dependencies"] if isinstance(entry, dict)]
    assert locked == sorted(conda) and len(locked) > 20


def test_lock_pins_every_direct_dependency():
    files = (ROOT / "requirements.in", ROOT / "requirements-dev.in")
    lines = [line.partition("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    wanted = {re.split(r"[=<>\[ ]", line)[0].lower().replace("_", "-"): line for line in lines if line}
    locked = dict(pin.split("==") for pin in pins((ROOT / "requirements.lock").read_text().splitlines()))
    assert set(wanted) <= set(locked)
    for name, line in wanted.items():
        if "==" in line:
            assert line == f"{name}=={locked[name]}"


def test_lock_holds_no_local_versions():
    assert not [pin for pin in pins((ROOT / "requirements.lock").read_text().splitlines()) if "+" in pin]
