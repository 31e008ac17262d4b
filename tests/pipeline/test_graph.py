"""The DVC graph of every experiment: its stages, what they depend on, and that every command composes."""

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("smoke", "local", "paper", "paper_released")


@pytest.fixture(scope="module", params=EXPERIMENTS)
def graph(request, resolved):
    """The stages of an experiment by name, and its parameters."""
    with resolved(request.param) as found:
        yield found


def paths(entries, folder):
    """Of dependencies or outputs that are files, relative to the folder."""
    return {Path(entry.fs_path).relative_to(folder).as_posix() for entry in entries if not hasattr(entry, "params")}


def test_every_cell_is_a_stage(graph):
    stages, lists, _ = graph
    name, decoders, encoders = lists["name"], lists["decoders"], lists["models"]
    cells = {(m, method) for m in encoders + decoders for method in lists["methods"]}
    cells |= {(m, method) for m in lists["ablation_models"] for method in lists["ablations"]}
    cells |= {(m, method) for m in decoders for method in lists["decoder_ablations"]}
    expected = {f"train@{name}-{model}-{method}" for model, method in cells}
    for kinds, models in (
        (("gradients", "basis"), encoders + decoders),
        (("energy",), encoders),
        (("efficiency",), lists["efficiency_models"]),
        (("answers", "judgments"), decoders),
        (("pretrain",), lists["pretrain"]),
    ):
        expected |= {f"{kind}@{name}-{model}" for kind in kinds for model in models}
    once = ["hosvd_cost", "cost_curves", "statistics", "tables", "figures", "examples", "report"]
    once += ["generate"] if lists["generate"] else []
    assert set(stages) == expected | {f"{kind}@{name}" for kind in once}


def test_what_a_stage_needs_is_configured_committed_fetched_or_made_before_it(graph):
    stages, lists, folder = graph
    made = {path for stage in stages.values() for path in paths(stage.outs, folder)}
    for name, stage in stages.items():
        for path in paths(stage.deps, folder):
            inside = any(f"{out}/".startswith(f"{path}/") or path.startswith(f"{out}/") for out in made)
            assert inside or path.startswith("conf/") or (path.startswith("data/") and not lists["generate"]), name
        for entry in stage.deps:
            if hasattr(entry, "params"):
                assert entry.exists and entry.get_hash(), f"{name}: {entry}"  # raises where the file lacks a key


def test_the_report_comes_last_and_everything_is_behind_it(graph):
    stages, lists, folder = graph
    behind, todo = set(), [f"report@{lists['name']}"]
    while todo:
        needed = paths(stages[todo.pop()].deps, folder)
        found = {
            name for name, stage in stages.items() for out in paths(stage.outs, folder) for path in needed
            if f"{out}/".startswith(f"{path}/") or path.startswith(f"{out}/")
        }  # fmt: skip
        todo += found - behind
        behind |= found
    assert behind == set(stages) - {f"report@{lists['name']}"}


def test_every_command_names_a_script_and_composes(graph):
    stages, lists, folder = graph
    default = {"train": "glue", "gradients": "glue", "basis": "glue", "answers": "mt_bench", "judgments": "mt_bench"}
    default |= {"method_statistics": "statistics"}
    seen = set()
    with initialize_config_dir(str(folder / "conf"), version_base=None):
        for name, stage in stages.items():
            words = shlex.split(stage.cmd)
            assert words[0] == "python" and (ROOT / words[1]).is_file(), name
            script, overrides = Path(words[1]).stem, [word for word in words[2:] if "=" in word]
            entry = words[3] if words[2] == "--config-name" else default.get(script, script)
            assert f"name={lists['name']}" in overrides, name
            assert not {word for word in words[2:] if "=" not in word} - {"--config-name", entry}, name
            new = {(script, entry, word) for word in overrides} - seen  # groups are independent: each choice once
            if new:
                assert OmegaConf.to_container(compose(entry, overrides), resolve=True)["name"] == lists["name"], name
            seen |= new
