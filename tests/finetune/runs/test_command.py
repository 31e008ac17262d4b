"""Around the work of a script: experiment files, one writer a cell, errors in one line."""

from pathlib import Path

import pytest

from finetune.runs.command import exit_with_message, only_writer, read_lists


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("tasks: [cola]\n", r"params.yaml: 'seeds' is None; it must be a list of at least one\."),
        ("tasks: []\nseeds: [1]\n", r"params.yaml: 'tasks' is \[\]; it must be a list of at least one\."),
        ("tasks: cola\nseeds: [1]\n", r"params.yaml: 'tasks' is 'cola'; it must be a list of at least one\."),
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


def test_a_cell_has_one_writer(tmp_path):
    folder = Path("results/local/runs/minilm/full")
    with only_writer(folder, tmp_path):
        text = r"results/local/runs/minilm/full: another process is working on this cell; wait for it, or end it\."
        with pytest.raises(ValueError, match=text), only_writer(folder, tmp_path):
            pass
        with only_writer(Path("results/local/runs/minilm/lora"), tmp_path):
            pass
    with only_writer(folder, tmp_path):
        pass


@pytest.mark.parametrize("error", [ValueError("what is wrong"), ImportError("what is wrong")])
def test_users_errors_become_one_line(error):
    with pytest.raises(SystemExit, match="^error: what is wrong$"), exit_with_message():
        raise error


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), KeyboardInterrupt()])
def test_programming_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), exit_with_message():
        raise error
