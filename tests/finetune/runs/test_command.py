"""Around the work of a script: experiment files, one writer a cell, errors in one line."""

import sys
from pathlib import Path

import pytest

from finetune.runs.command import only_writer, read_lists, script
from finetune.store.files import expand_home

CONF = Path(__file__).parents[3] / "conf"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("tasks: [cola]\n", r"params.yaml: 'seeds' is None; it must be a list of at least one\."),
        ("tasks: []\nseeds: [1]\n", r"params.yaml: 'tasks' is \[\]; it must be a list of at least one\."),
        ("tasks: cola\nseeds: [1]\n", r"params.yaml: tasks='cola'; allowed: a list\."),
        ("tasks: [a/b]\nseeds: [1]\n", r"params.yaml: tasks\[0\]='a/b'; allowed: a name"),
        ("tasks: [cola]\nseeds: [1, 1]\n", r"params.yaml: seeds=\[1, 1\]; allowed: each only once\."),
        ("tasks: [cola]\nseeds: ['1']\n", r"params.yaml: seeds\[0\]='1'; allowed: a whole number\."),
        ("", r"params.yaml holds a NoneType, no mapping"),
        (None, r"there is no .*params.yaml; its folder has no YAML file"),
    ],
)
def test_lists_of_an_experiment_file(content, text, tmp_path):
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=text):
        read_lists(path)
    path.write_text("name: a\ntasks: [cola]\nseeds: [1, 2]\nmodels: [x]\n")
    assert read_lists(path) == {"tasks": ["cola"], "seeds": [1, 2]}


def test_of_several_processes_the_first_holds_a_folder(tmp_path, monkeypatch):
    with only_writer(tmp_path / "runs", tmp_path / "locks"):
        with (
            pytest.raises(ValueError, match="another process is working on it"),
            only_writer(tmp_path / "runs", tmp_path / "locks"),
        ):
            pass
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with only_writer(tmp_path / "runs", tmp_path / "locks"):
            pass


def test_a_tilde_is_the_home_folder_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {"root": "~/data", "deep": [{"cache": "~"}, "~/a/b"], "kept": ["a~/b", "~ 5", ".*~", 3, None, True]}
    assert expand_home(given) == given | {"root": "/home/me/data", "deep": [{"cache": "/home/me"}, "/home/me/a/b"]}
    with pytest.raises(ValueError, match="'~nobody-has-it/data': there is no home folder of that name; give the whole"):
        expand_home({"root": "~nobody-has-it/data"})


def test_a_script_gets_its_paths_with_the_home_folder(monkeypatch, tmp_path):
    """From the environment and from the command line, for every option."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SPARSEGRAD_DATA", "~/data")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set by the script
    names = ("output", "checkpoints", "basis", "wandb.folder", "model.checkpoint", "cell")
    given = [f"{name}='~/{name}'" for name in names]
    monkeypatch.setattr(
        sys, "argv", ["script", "-cp", str(CONF), "model=tiny_bert", f"hydra.run.dir={tmp_path}", *given]
    )
    monkeypatch.setattr("hydra.core.utils.configure_log", lambda *_: None)  # that of the tests stays
    seen = []
    script("glue")(seen.append)()
    (config,) = seen
    assert config["data"]["root"] == "/home/me/data"
    found = [config["output"], config["checkpoints"], config["basis"], config["wandb"]["folder"]]
    found += [config["model"]["checkpoint"], config["cell"]]
    assert found == [f"/home/me/{name}" for name in names]


def test_a_file_that_includes_itself_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set by the script
    (tmp_path / "report.yaml").write_text("defaults: [_self_, report]\nname: x\n")
    monkeypatch.setattr(sys, "argv", ["script", "-cp", str(tmp_path), f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit, match="error: .*recursion"):
        script("report")(lambda config: None)()
