"""Journal: what is written stays. Torn lines, damaged lines, a disk that takes no more, a file that is replaced."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.mt_bench.journal import Journal, read_items


def number(item):
    return item["n"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "items.jsonl"


def test_items_come_back_and_the_last_of_a_key_wins(path):
    journal = Journal(path, number)
    with pytest.raises(ValueError):
        journal.append({"n": 1, "score": float("nan")})
    assert journal.items == {} and not path.exists()
    for n, text in ((1, "a"), (2, "ö\u2028\r"), (1, "c")):
        journal.append({"n": n, "text": text})
    again = Journal(path, number)
    assert again.items == journal.items == {1: {"n": 1, "text": "c"}, 2: {"n": 2, "text": "ö\u2028\r"}}
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("kept", [1, 8, 20, 21])
def test_a_torn_last_line_is_cut_off_and_its_item_done_again(path, kept, caplog):
    journal = Journal(path, number)
    journal.append({"n": 1, "text": "a"})
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"n": 2, "text": "b"}'[:kept])
    again = Journal(path, number)
    assert list(again.items) == [1] and path.read_bytes() == whole and "line 2 is torn" in caplog.text
    again.append({"n": 2, "text": "c"})
    assert Journal(path, number).items[2] == {"n": 2, "text": "c"}


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_byte_that_was_changed_is_found_wherever_it_is(place, byte):
    """Each item comes back as it was, or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        items = {n: {"n": n, "score": 5 + n, "text": "a\nb"} for n in (1, 2, 3)}
        for item in items.values():
            Journal(path, number).append(item)
        content = bytearray(path.read_bytes())
        content[place % len(content)] = byte
        path.write_bytes(content)
        try:
            found = Journal(path, number, checked=True).items
        except ValueError as error:
            assert "holds no item" in str(error)
        else:
            assert found.items() <= items.items() and len(found) >= 1


@given(st.integers(0, 400))
def test_a_file_that_was_cut_anywhere_keeps_its_whole_lines(size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        for n in (1, 2, 3):
            Journal(path, number).append({"n": n, "text": "ü\u2028"})
        content = path.read_bytes()
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        assert list(Journal(path, number).items) == [1, 2, 3][:whole]
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:whole])


def test_lines_that_are_not_believed_are_named_and_taken_off_the_file(path, caplog):
    journal = Journal(path, number)
    for n in (1, 2, 3):
        journal.append({"n": n})
    text = path.read_text()
    path.write_text(text.replace('{"n": 2', '{"n": 5'))
    again = Journal(path, number, lambda item: "an odd reason" if item["n"] == 3 else None)
    assert list(again.items) == [1]
    assert "2 lines are not believed, done again: it was changed after" in caplog.text
    assert "(its checksum does not fit) (1); an odd reason (1)" in caplog.text
    again.keep(again.items)
    assert path.read_text() == text.splitlines(keepends=True)[0]
    with pytest.raises(ValueError, match="line 1: it was changed after it was written .*run the stage that writes it"):
        path.write_text(text.replace('{"n": 1', '{"n": 7'))
        read_items(path)


@pytest.mark.parametrize("line", ["{broken", "[]", "", '{"m": 1}', "\0\0\0"])
def test_a_damaged_line_elsewhere_is_named_and_nothing_is_lost(path, line):
    path.parent.mkdir()
    content = f'{{"n": 1}}\n{line}\n{{"n": 3}}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"items\.jsonl, line 2 .*repair it or remove it"):
        Journal(path, number)
    assert path.read_text() == content


def test_rewrite_replaces_the_file_at_once(path, monkeypatch):
    journal = Journal(path, number)
    for n in (3, 1, 3):
        journal.append({"n": n})
    journal.rewrite(sorted(journal.items.values(), key=number))
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 3]
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device.*run again"):
        journal.rewrite([])
    assert path.read_text() == before and list(journal.items) == [1, 3]


def test_a_disk_that_fills_up_in_a_line_keeps_whole_lines_only(path):
    """The kernel takes a part of the line and refuses the rest: a limit on the size of files does as a full disk."""
    path.parent.mkdir()
    code = f"""
import resource
from finetune.mt_bench.journal import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (180, resource.RLIM_INFINITY))
journal = Journal({str(path)!r}, lambda item: item["n"])
for n in range(10):
    journal.append({{"n": n, "text": "x" * 20}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError" in done.stderr and "can't be written (File too large)" in done.stderr
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["n"] for line in lines] == [0, 1] and all(line.endswith("\n") for line in lines)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    journal = Journal(path, number)
    journal.append({"n": 2})
    assert list(Journal(path, number).items) == [0, 1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_device_is_said_and_the_item_is_not_counted(path):
    journal = Journal(path, number)
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    with pytest.raises(ValueError, match="No space left on device.*What is written is kept"):
        journal.append({"n": 1})
    assert journal.items == {}


def test_another_stages_file_is_read_and_left_as_it_is(path):
    path.parent.mkdir()
    path.write_text('{"n": 1}\n{"n": 2, "te')
    with pytest.raises(ValueError, match="line 2"):
        read_items(path)
    assert path.read_text() == '{"n": 1}\n{"n": 2, "te'
    path.write_text('{"n": 1}\n\n{"n": 2}')
    assert read_items(path) == [{"n": 1}, {"n": 2}]
    with pytest.raises(ValueError, match="does not exist"):
        read_items(path.parent / "other.jsonl")
