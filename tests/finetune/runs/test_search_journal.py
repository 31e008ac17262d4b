"""The journal of a search: torn, flipped, cut, foreign. The search goes on to the same trials, or says why not."""

import json
import logging
import os

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.runs.search import SearchSpace, run_search, summary
from finetune.runs.search_journal import open_storage
from finetune.training.loop import NonFiniteLoss

SPACE = SearchSpace(
    (1e-5, 1e-1), (8, 16), 6, startup_trials=2, seed=34, points=({"learning_rate": 1e-3, "batch_size": 8},)
)


def objective(point, report):
    """A point decides its outcome: the highest rates diverge, low ones are pruned."""
    if point["learning_rate"] > 2e-2:
        raise NonFiniteLoss("loss is nan at step 1")
    for step in (10, 20):
        report(step, point["learning_rate"] * step)
    return point["learning_rate"] + point["batch_size"], 0.5


def searched(path):
    study = run_search(objective, SPACE, open_storage(path), "a")
    found = summary(study, SPACE)
    return found | {"trials": [trial | {"seconds": None} for trial in found["trials"]]}


@pytest.fixture(scope="module", autouse=True)
def in_memory():
    """No test waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of an unbroken search's journal, and what the search found."""
    path = tmp_path_factory.mktemp("whole") / "a.journal"
    found = searched(path)
    assert {trial["state"] for trial in found["trials"]} == {"complete", "diverged", "pruned"}
    return path.read_bytes(), found


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """``again(content)``: what a search finds that goes on from a journal of this content; its path."""

    def make(content):
        path = tmp_path_factory.mktemp("again") / "a.journal"
        path.write_bytes(content)
        return searched(path), path

    return make


def test_a_kill_after_any_operation_changes_no_trial(whole, again):
    content, expected = whole
    lines = content.splitlines(keepends=True)
    for number in range(len(lines)):
        assert again(b"".join(lines[:number]))[0] == expected, lines[number - 1]


@given(data=st.data())
def test_a_journal_that_is_cut_or_flipped_anywhere_gives_the_same_search_or_is_refused(data, whole, again):
    content, expected = whole
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content if (bit := data.draw(st.integers(-4, 7))) >= 0 else content[:place])
    if bit >= 0:
        changed[place] ^= 1 << bit
    try:
        found, path = again(bytes(changed))
    except ValueError as error:
        assert "is no journal of a search: move it away" in str(error) and place < len(b'{"op_code":')
    else:
        assert found == expected
        if bit >= 0 and place < content.rindex(b"\n", 0, -1):
            assert (path.parent / "earlier" / "a.journal").read_bytes() == changed


@pytest.mark.parametrize("where", ["end", "middle"])
def test_a_torn_line_is_named_and_taken_off(where, whole, again, caplog):
    content, expected = whole
    lines = content.splitlines(keepends=True)
    torn = lines[4][:40] if where == "middle" else lines[-1][:40]
    rest = lines[5:] if where == "middle" else []
    number = 5 if where == "middle" else len(lines)
    with caplog.at_level(logging.WARNING):
        found, path = again(b"".join([*lines[: number - 1], torn, *rest]))
    assert found == expected
    assert f"a.journal: line {number} is torn; it is taken off, and its work is done again" in caplog.text
    assert (path.parent / "earlier").exists() == (where == "middle")
    assert path.read_bytes().startswith(b"".join(lines[: number - 1])) and searched(path) == expected


def test_lines_that_are_swapped_or_missing_are_not_taken_for_the_search(whole, again):
    content, expected = whole
    lines = content.splitlines(keepends=True)
    values = [number for number, line in enumerate(lines) if b'"op_code":6' in line]
    swapped = [*lines]
    swapped[values[0]], swapped[values[2]] = swapped[values[2]], swapped[values[0]]
    for changed in (swapped, lines[: values[0]] + lines[values[0] + 1 :], [*lines, b'{"op_code":6}\n']):
        assert again(b"".join(changed))[0] == expected


def test_optunas_own_journal_goes_on(tmp_path, whole):
    """As those of results/local were written: without hashes, which follow from the first new line on."""
    theirs = optuna.storages.journal.JournalFileBackend(str(tmp_path / "a.journal"))
    run_search(objective, SearchSpace(**{**vars(SPACE), "trials": 3}), optuna.storages.JournalStorage(theirs), "a")
    before = (tmp_path / "a.journal").read_bytes()
    assert b'"sum"' not in before and searched(tmp_path / "a.journal") == whole[1]
    after = (tmp_path / "a.journal").read_bytes()
    assert after.startswith(before) and json.loads(after.splitlines()[-1])["sum"]
    (tmp_path / "a.journal").write_bytes(after.replace(b'"batch_size":8', b'"batch_size":9', 1))
    assert searched(tmp_path / "a.journal") == whole[1]


@pytest.mark.parametrize("content", [b"# Read me\n", b'{"n": 1}\n', b"\0\0", b'{"op_code":4,"study_id":7}\n', b"[]\n"])
def test_a_file_that_is_no_journal_is_refused_and_left(content, again, tmp_path):
    path = tmp_path / "a.journal"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.journal is no journal of a search: move it away"):
        open_storage(path)
    assert path.read_bytes() == content


def test_nothing_is_waited_for(whole, again, tmp_path):
    """A lock that a killed process left: of Optuna's own kind, it dangles and is never given up."""
    (tmp_path / "a.journal").write_bytes(whole[0][:300])
    os.symlink("a.journal", tmp_path / "a.journal.lock")
    assert searched(tmp_path / "a.journal") == whole[1]


@pytest.mark.parametrize("number", [1, 4, 9, 16])
def test_a_full_disk_shifts_no_trial(number, whole, tmp_path, monkeypatch):
    """The write with this number is refused in its middle; a later call goes on as if nothing had been."""
    path, write, seen = tmp_path / "a.journal", os.write, []

    def full(handle, data):
        seen.append(handle)
        if len(seen) == number:
            write(handle, bytes(data[:20]))
            raise OSError(28, "No space left on device")
        return write(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device: .*a.journal"):
            searched(path)
    assert path.read_bytes().endswith(b"\n") or not path.read_bytes()
    assert searched(path) == whole[1]


def test_an_error_of_the_objective_shifts_no_trial(whole, tmp_path):
    calls = []

    def failing(point, report):
        calls.append(point)
        if len(calls) in (2, 4):
            raise OSError(28, "No space left on device")
        return objective(point, report)

    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            run_search(failing, SPACE, open_storage(tmp_path / "a.journal"), "a")
    assert calls[1] == calls[2]
    assert searched(tmp_path / "a.journal") == whole[1]
