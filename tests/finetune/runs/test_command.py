"""Around the work of a script: experiment files, one writer a cell, errors in one line."""

import pytest

from finetune.runs.command import only_writer, read_lists


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


def test_of_several_processes_the_first_holds_a_folder(tmp_path, monkeypatch):
    with only_writer(tmp_path / "runs", tmp_path / "locks"):
        with (
            pytest.raises(ValueError, match="another process is working on it"),
            only_writer(tmp_path / "runs", tmp_path / "locks"),
        ):
            pass
        monkeypatch.setenv("RANK", "1")
        with only_writer(tmp_path / "runs", tmp_path / "locks"):
            pass
