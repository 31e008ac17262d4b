"""A parameter that decides a stage's numbers is one that DVC watches: each value of a configuration is changed once."""

import copy
import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune import models
from finetune.data.glue import Task
from finetune.efficiency import cell as efficiency
from finetune.efficiency import cost_curves, hosvd_cost
from finetune.efficiency.task import identity as efficiency_identity
from finetune.energy.cell import identity as energy_identity
from finetune.runs import cells, chat, glue
from finetune.runs.problem import Run

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
STAGES = [
    *("gradients@smoke-tiny_bert", "gradients@smoke-tiny_llama", "train@smoke-tiny_bert-full"),
    *("train@smoke-tiny_bert-sparsegrad", "train@smoke-tiny_llama-sparsegrad", "energy@smoke-tiny_bert"),
    *("efficiency@smoke-tiny_bert", "hosvd_cost@smoke", "cost_curves@smoke"),
]


class Told:
    """A split that is what it was asked for."""

    def __init__(self, role, asked):
        self.content, self.longest, self.rows = f"{role} {asked}", 8, 64
        self.input_ids = [[1, 2, 3]] * 64
        self.sha256 = self.content

    def __len__(self):
        return self.rows


@pytest.fixture(scope="module")
def stages(resolved):
    """Command and watched parameters of the smoke experiment's stages: ``{name: (cmd, {file: keys})}``."""
    with resolved("smoke") as (found, _, folder):
        return {
            stage.name: (
                stage.cmd,
                {Path(e.fs_path).relative_to(folder).as_posix(): e.params for e in stage.deps if hasattr(e, "params")},
            )
            for stage in found.values()
        }


@pytest.fixture
def files_are_what_is_asked(monkeypatch):
    """No data, no model: their place is taken by what was asked for."""

    def load_task(data, tokenizer, **asked):
        task = Task.from_config(data)
        said = json.dumps([{k: v for k, v in data.items() if k != "tasks"}, asdict(task), asked], sort_keys=True)
        return task, {role: Told(role, said) for role in ("train", "validation")}

    def load_chat(data, tokenizer, template, **asked):
        said = json.dumps([data, template.name, asked], sort_keys=True)
        return {role: Told(role, said) for role in ("train", "validation")}

    monkeypatch.setattr(glue, "load_task", load_task)
    monkeypatch.setattr("finetune.data.glue.load_task", load_task)
    monkeypatch.setattr(chat, "load_chat", load_chat)
    monkeypatch.setattr(models, "load_tokenizer", lambda model, root: None)
    monkeypatch.setattr(models, "contents", lambda model, root: {"sha256": json.dumps([model["checkpoint"], root])})
    bases = lambda self, task: ({}, {"sha256": json.dumps(self.made_for(task))})  # noqa: E731
    monkeypatch.setattr(glue.GlueProblem, "bases", bases)
    monkeypatch.setattr(chat.ChatProblem, "bases", bases)


def decided(script, config):
    """What a stage's numbers come from, by its script."""
    if script == "hosvd_cost":
        cases, options = hosvd_cost.read_config(config)
        return [config["version"], [asdict(case) for case in cases], asdict(options)]
    if script == "cost_curves":
        return [config["version"], asdict(cost_curves.read_config(config))]
    if script == "efficiency":
        lengths, labels = efficiency._lengths(config, "cola", None)
        content = efficiency_identity(config["model"], config["protocol"], lengths, efficiency._options(config, labels))
        return [config["version"], lengths.source, content]
    problem = cells.make_problem({"problem": "glue", **config})
    if script == "energy":
        return [energy_identity(problem, "cola", name) for name in config["scale"]["trajectories"]]
    task = "cola" if problem.group == "data" else problem.task
    made = [problem.made_for(task), problem.gradients_seed]
    if script == "gradients":
        return made
    run = Run(task, 1, problem.hyperparameters())
    found = [problem.identity(run), repr(replace(problem.options(run, 1), evaluation_batch_size=1))]
    if problem.searches:
        sizes = problem.config["scale"]["search"]
        found += [problem.identity(Run(task, 34, {"max_steps": sizes["max_steps"]}, search=True)), sizes["trials"]]
    return found


def leaves(content, path=()):
    if isinstance(content, dict) and content:
        return [leaf for key, value in content.items() for leaf in leaves(value, (*path, key))]
    return [path]


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {None: 1}.get(value, f"{value}x") if value is None or isinstance(value, str) else [*value, 1]


def changed(config, path):
    found = copy.deepcopy(config)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = another(inner[path[-1]])
    return found


def files_of(name):
    """Top-level key -> the file that it comes from; of several the last in Hydra's order."""
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    found = {}
    for entry in content.get("defaults", ["_self_"]):
        if entry == "_self_":
            found |= dict.fromkeys(content, f"conf/{name}.yaml")
        elif isinstance(entry, str):
            found |= files_of(entry)
    return found


def source(path, config, entry, overrides):
    """The file below conf/ that a value comes from, and its key there; None where the command gives it."""
    group, *inner = path
    if group == "methods":
        return f"conf/method/{path[1]}.yaml", path[2]
    if (CONF / group).is_dir():
        return f"conf/{group}/{overrides.get(group, config[group]['name'])}.yaml", inner[0]
    return None if group in overrides else (files_of(entry)[group], group)


NO_NUMBERS = {"checkpoint_seconds", "wandb", "title", "checkpoint", "revision", "folder", "files", "root", "source"}
"""Read here because they stand for files, or decide when a run is saved."""


@pytest.mark.parametrize("name", STAGES)
def test_what_decides_a_stages_numbers_is_watched(name, stages, files_are_what_is_asked):
    command, watched = stages[name]
    _, script, *words = shlex.split(command)
    overrides = dict(word.split("=", 1) for word in words if "=" in word)
    script = Path(script).stem
    entry = words[words.index("--config-name") + 1] if "--config-name" in words else script
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose(entry, [word for word in words if "=" in word])
    config = OmegaConf.to_container(composed, resolve=True)
    before, deciding = decided(script, config), 0
    for path in leaves(config):
        try:
            same = decided(script, changed(config, path)) == before
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # it was read
            same = False
        if same or path[-1] in NO_NUMBERS:
            continue
        where = source(path, config, entry, overrides)
        deciding += 1
        if where is not None:
            file, key = where
            keys = watched.get(file)
            assert keys == [] or (keys and key in keys), f"{name} does not watch {key} of {file}"
    assert deciding > 8
