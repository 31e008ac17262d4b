"""Where an error meets the user: one line with a remedy and an exit code; programming errors keep their traceback."""

import errno

import pytest
import torch
import yaml
from safetensors import SafetensorError

from finetune.store.boundary import exit_with_message


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
