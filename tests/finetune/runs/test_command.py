"""Around the work of a script: experiment files, one writer a cell, errors in one line."""

import errno

import pytest
import torch
import yaml
from safetensors import SafetensorError

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


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("what\n  is wrong"), "what is wrong"),
        (ImportError("what is wrong"), "what is wrong"),
        (yaml.YAMLError("what is wrong"), "what is wrong"),
        (SafetensorError("what is wrong"), "what is wrong"),
        (OSError("what is wrong"), "what is wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device: make room, and run "),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room, and run again"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "a: Not a directory: a file is in the way"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "a: File exists: a file is in the way"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a: Is a directory: a folder is in the way"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied: choose another place"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a: Read-only file system: choose another place"),
        (OSError(errno.EIO, "Input/output error", "a"), "a: Input/output error$"),
        (MemoryError(), "out of memory: lower batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), "out of memory: lower batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: lower batch_size"),
    ],
)  # fmt: skip
def test_users_errors_become_one_line(error, text):
    with pytest.raises(SystemExit, match=f"^error: {text}") as ended, exit_with_message():
        raise error
    assert "\n" not in str(ended.value) and "elete" not in str(ended.value)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), TypeError("x")])
def test_programming_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), exit_with_message():
        raise error


def test_an_interruption_is_one_line(caplog):
    @exit_with_message()
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert caplog.messages == ["interrupted: what is finished is kept; run again to go on"]
