"""Records: a hash that means the configuration, files that are whole, nothing read that a cell does not list."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from finetune.store import files, records

CONFIG = {"model": {"name": "a", "k": 7, "blocks": [1, 2]}, "lr": 1e-3, "seed": 1, "limit": None, "flag": True}


def test_hash_does_not_depend_on_the_order_of_keys():
    turned = dict(reversed(CONFIG.items())) | {"model": dict(reversed(CONFIG["model"].items()))}
    assert records.config_hash(turned) == records.config_hash(CONFIG)
    assert re.fullmatch("[0-9a-f]{12}", records.config_hash(CONFIG))


@pytest.mark.parametrize(
    "change",
    [
        *({"model": CONFIG["model"] | change} for change in ({"name": "b"}, {"k": 8}, {"blocks": [2, 1]})),
        *({"lr": 2e-3}, {"seed": 2}, {"seed": "1"}, {"limit": 0}, {"flag": False}, {"new": None}),
    ],
    ids=str,
)
def test_hash_changes_with_every_value(change):
    assert records.config_hash(CONFIG | change) != records.config_hash(CONFIG)


def test_hash_refuses_what_json_has_not():
    with pytest.raises(ValueError):
        records.config_hash({"lr": float("nan")})


def test_hash_is_the_same_in_every_version():
    """Records in git carry it: this value may change with ``version`` in conf/base.yaml only."""
    assert records.config_hash({"a": 1, "b": [1.5, None, "x"]}) == "51824779aebd"


def test_record_comes_back(tmp_path):
    path = tmp_path / "a" / "b.json"
    records.write_json(path, CONFIG)
    assert records.read_json(path) == CONFIG
    assert path.read_text().endswith("}\n")
    assert os.stat(path).st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_not_are_refused(value, tmp_path):
    records.write_json(tmp_path / "a.json", {"score": 1})
    with pytest.raises(ValueError):
        records.write_json(tmp_path / "a.json", {"evaluations": [{"loss": value}]})
    assert records.read_json(tmp_path / "a.json") == {"score": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_while_writing_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    records.write_json(tmp_path / "a.json", {"score": 1})

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        records.write_json(tmp_path / "a.json", {"score": 2})
    assert records.read_json(tmp_path / "a.json") == {"score": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a.json does not exist: run the stage that writes it\."),
        (b"[1, 2]", r"a.json holds a list, not a JSON object\."),
        *(
            (content, r"a.json is damaged, or no JSON \(.*\): move")
            for content in (b"", b'{"a', b"\xff\xfe{}", b"[" * 100_000)
        ),
    ],
)
def test_a_file_that_is_no_record_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        records.read_json(tmp_path / "a.json")


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """The project's files in a git repository of their own."""
    git(tmp_path, "init", "-q")
    names = ("pyproject.toml", "src/a.py", "conf/base.yaml", "experiments/train.py", "params.yaml", "README.md")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "a")
    return tmp_path


def test_provenance_names_commit_packages_and_machine(repository, monkeypatch):
    found = records.provenance(repository)
    assert found["commit"] == git(repository, "rev-parse", "HEAD") and found["dirty"] is False
    assert set(found["packages"]) == set(records.PACKAGES) and found["packages"]["torch"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["python"]) and found["platform"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["created"])
    json.dumps(found, allow_nan=False)
    monkeypatch.setenv("PATH", str(repository))  # without git
    assert records.provenance(repository)["commit"] is None


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        *((name, True) for name in ("src/a.py", "src/new.py", "conf/base.yaml", "experiments/train.py")),
        *((name, False) for name in ("params.yaml", "README.md", "results.json")),
    ],
)
def test_code_and_configuration_decide_what_is_dirty(name, dirty, repository):
    (repository / name).write_text("y\n")
    assert records.provenance(repository)["dirty"] is dirty


def test_the_commit_of_an_enclosing_repository_is_not_the_projects(repository):
    """A copy of the project inside another repository, committed there or not, and a folder that is no project."""
    inside = repository / "copy"
    inside.mkdir()
    for place in (inside, repository / "src"):
        found = records.provenance(place)
        assert found["commit"] is None and found["dirty"] is None
    (inside / "pyproject.toml").write_text("x\n")
    assert records.provenance(inside)["commit"] is None
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "b")
    assert records.provenance(inside)["commit"] is None
    (repository / "pyproject.toml").unlink()  # a repository that is not the project's
    assert records.provenance(repository)["commit"] is None


@pytest.mark.parametrize("elsewhere", ["hook", "owner"])
def test_a_repository_that_is_not_the_projects_or_not_ours_says_nothing(elsewhere, repository, tmp_path, monkeypatch):
    """A hook's GIT_DIR, which git would follow from any folder; a checkout that git refuses as another user's."""
    own = records.provenance(repository)
    if elsewhere == "hook":
        other = tmp_path / "other"
        git(tmp_path, "init", "-q", str(other))
        git(other, "commit", "-q", "--allow-empty", "-m", "other")
        monkeypatch.setenv("GIT_DIR", str(other / ".git"))
        found = records.provenance(repository)
        assert (found["commit"], found["dirty"]) == (own["commit"], False)
    else:
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        found = records.provenance(repository)
        assert (found["commit"], found["dirty"]) == (None, None)


def test_the_project_is_the_folder_of_this_code(monkeypatch, tmp_path):
    root = Path(records.__file__).parents[3]
    assert root.resolve() == records.PROJECT
    monkeypatch.chdir(tmp_path)
    here = records.provenance()["commit"]
    assert here == records.provenance(root)["commit"]


def test_a_copy_is_of_the_commit_that_is_told_and_a_repository_of_its_own(repository):
    assert records.provenance(repository / "src", commit="abc")["commit"] == "abc"
    assert records.provenance(repository, commit="abc")["commit"] == git(repository, "rev-parse", "HEAD")
