"""Places that are written to: one writer, whatever ends it; unwritable ones found before the work; leftovers swept."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from finetune.store.files import folder_atomically, sweep, write_atomically
from finetune.store.places import Busy, check_writable, locked, only_writer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results" / "minilm" / "full"


@pytest.fixture
def locks(tmp_path):
    return tmp_path / "locks"


def test_a_place_has_one_writer_and_no_lock_is_left(folder, locks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with only_writer(folder, locks):
        for same in (folder, folder.relative_to(tmp_path), folder / ".." / "full"):
            with pytest.raises(Busy, match=r"full: another process is working on it; wait for it, or end it\."):
                locked(same, locks).__enter__()
        with locked(folder.parent / "lora", locks), locked(tmp_path / "results-minilm" / "full", locks):
            assert len(list(locks.iterdir())) == 3
    assert not list(locks.iterdir())
    with pytest.raises(KeyError), only_writer(folder, locks):
        raise KeyError
    assert not list(locks.iterdir())


def test_a_killed_writers_lock_is_free(folder, locks):
    code = (
        "import os, signal; from pathlib import Path; from finetune.store.places import locked\n"
        f"with locked(Path({str(folder)!r}), {str(locks)!r}): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(list(locks.iterdir())) == 1
    with locked(folder, locks):
        pass
    assert not list(locks.iterdir())


def test_a_lock_file_that_its_holder_deletes_is_not_held(folder, locks, monkeypatch):
    """The other process lets go between this one's opening the file and its locking it."""
    flock, opened = fcntl.flock, []

    def late(handle, how):
        opened.append(handle)
        if len(opened) == 1:
            next(locks.iterdir()).unlink()
        return flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(folder, locks), pytest.raises(Busy), locked(folder, locks):
        pass
    assert len(opened) == 3


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_remedy(number, folder, locks, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    text = r"locks is on a file system without locks \(.*\), .* set checkpoints=FOLDER on a local disk\."
    with pytest.raises(ValueError, match=text), only_writer(folder, locks):
        pass


@pytest.mark.parametrize("blocked", ["results", "results/minilm/full", "locks"])
def test_a_file_in_the_way_is_found(blocked, folder, locks, tmp_path):
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_text("x")
    with pytest.raises(OSError) as error, only_writer(folder, locks):
        pass
    assert str(tmp_path / blocked) in error.value.filename and (tmp_path / blocked).read_text() == "x"


def test_a_folder_in_a_files_place_and_a_full_disk_are_found(folder, monkeypatch):
    (folder / "a.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="a.json"):
        check_writable(folder, "a.json")
    check_writable(folder, "b.json")
    assert [path.name for path in folder.iterdir()] == ["a.json"]

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*full"):
        check_writable(folder)


LEFT = (".cola.json.k3_9a0xz", ".cola-seed1-0123.json.abc", ".cola.safetensors.abcd1234", ".cell.json.1", ".a.b.svg.x")
FOLDERS = (".seed42.x8rk2m_1", ".step_00000012")
KEPT = ("cola.json", ".gitignore", ".env.local", ".cola.json.swp", ".hidden", "seed42", "step_00000012", ".dvc.tmp")


def test_what_killed_writers_left_is_swept_and_nothing_else(folder, locks):
    for name in (*FOLDERS, *KEPT[5:]):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text("x")
    for name in (*LEFT, *KEPT[:5]):
        (folder / name).write_text("x")
    (folder / "seed42" / ".a.jsonl.k3_9a0xz").write_text("x")
    with only_writer(folder, locks):
        assert sorted(path.name for path in folder.iterdir()) == sorted(KEPT)
        assert [path.name for path in (folder / "seed42").iterdir()] == ["model.safetensors"]


def test_of_a_shared_folder_only_the_own_files_leftovers_are_swept(folder):
    folder.mkdir(parents=True)
    others = (".b.json.abc", ".a.json2.abc", ".a_json.abc", ".a.json.swp", "a.json")
    for name in (".a.json.abc", ".a.json.def", *others):
        (folder / name).write_text("x")
    sweep(folder, "a.json")
    assert sorted(path.name for path in folder.iterdir()) == sorted(others)


def test_what_is_written_again_sweeps_its_own_leftovers(tmp_path):
    (tmp_path / ".a.json.k3_9a0xz").write_text("half")
    (tmp_path / ".model.k3_9a0xz").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("x")
    write_atomically(tmp_path / "a.json", "whole")
    with pytest.raises(KeyError), folder_atomically(tmp_path / "model"):
        raise KeyError
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"]
    with folder_atomically(tmp_path / "model") as folder:
        (folder / "new").write_text("x")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a.json", "model", "model/new"]
