"""Parsers of data on anything: the right rows, or one ValueError; never another error, never something else's rows."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.chat import escape
from finetune.data.glue import Task, encode
from finetune.data.tables import read_files
from finetune.data.threads import threads_of
from finetune.store.shards import shards

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TASKS = {
    "two classes": Task("cola", "CoLA", ("sentence",), 2, "accuracy"),
    "three classes": Task("mnli", "MNLI", ("premise", "hypothesis"), 3, "accuracy"),
    "regression": Task("stsb", "STS-B", ("sentence1", "sentence2"), 1, "pearson", label_range=(0.0, 5.0)),
}
TEXT = st.text(max_size=12)
CELL = st.one_of(TEXT, TEXT, TEXT, st.none(), st.just(""), st.integers(0, 3))
LABEL = {
    "whole": st.integers(-2, 4),
    "number": st.floats(-1, 6) | st.just(math.nan) | st.just(math.inf),
    "word": TEXT,
    "truth": st.booleans(),
}


class Words:
    """A tokenizer: one token a character, and one before them."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, *texts, **_):
        return {"input_ids": [[2] + [ord(c) % 97 for text in row for c in text] for row in zip(*texts, strict=True)]}


@st.composite
def rows(draw, task):
    """Columns of a split, some of the wrong type; None where pyarrow can't make a table of them."""
    number, kind = draw(st.integers(0, 4)), draw(st.sampled_from(sorted(LABEL)))
    columns = {name: draw(st.lists(CELL, min_size=number, max_size=number)) for name in task.columns}
    columns["label"] = draw(
        st.lists(LABEL[kind] | st.none() if draw(st.booleans()) else LABEL[kind], min_size=number, max_size=number)
    )
    try:
        return pa.table(columns)
    except (pa.ArrowException, TypeError):
        return None


@pytest.mark.parametrize("name", TASKS)
@given(data=st.data())
def test_rows_of_glue(name, data):
    task = TASKS[name]
    table = data.draw(rows(task))
    if table is None:
        return
    try:
        split = encode(table, task, Words(), 64)
    except ValueError as error:
        assert str(error).startswith(f"{task.name}: ")
        return
    labels = table.column("label").to_pylist()
    assert split.labels.tolist() == torch.tensor(labels, dtype=split.labels.dtype).tolist() and len(split) == len(
        labels
    )
    assert all(isinstance(text, str) for column in task.columns for text in table.column(column).to_pylist())
    allowed = (0, 5) if task.num_labels == 1 else range(task.num_labels)
    assert all(allowed[0] <= label <= allowed[-1] for label in labels)
    assert not any(isinstance(label, bool) for label in labels)


NAME = st.tuples(
    st.integers(0, 3), st.integers(1, 3), st.sampled_from(["", "", "", "-0123456789abcdef", " (1)", "-old"])
)


@SHARED
@given(named=st.lists(NAME, unique=True, max_size=4))
def test_names_of_shards(named, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for number, count, end in named:
        (folder / f"train-{number:05}-of-{count:05}{end}.parquet").touch()
    counts = {count for _, count, _ in named}
    right = not named or (
        not {end for *_, end in named} & {" (1)", "-old"}
        and len(counts) == 1
        and sorted(number for number, *_ in named) == list(range(*counts))
    )
    if right:
        assert [int(file.name[6:11]) for file in shards(folder, "train")] == list(range(len(named)))
    else:
        with pytest.raises(ValueError, match=f"{folder}"):
            shards(folder, "train")
    assert shards(folder, "validation") == []


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"sentence": ["a cat", "the dog"] * 8, "label": [0, 1] * 8}), path)
    return path, path.read_bytes()


@SHARED
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3), keep=st.floats(0, 1))
def test_damaged_parquet_is_refused_or_read(places, keep, parquet):
    """A changed byte of a text is another text; the hash of the file tells."""
    path, content = parquet
    changed = bytearray(content)
    for place, byte in places:
        changed[int(place * (len(content) - 1))] = byte
    for damaged in (bytes(changed), content[: int(keep * len(content))]):
        path.write_bytes(damaged)
        try:
            table, _ = read_files([path])
        except ValueError as error:
            assert str(error).startswith(f"{path} is no readable parquet (") and "\n" not in str(error)
        else:
            table.to_pylist()


ROLE = st.sampled_from(["prompter", "assistant"])


@given(
    drawn=st.lists(
        st.tuples(st.none() | st.integers(0, 9), ROLE, st.sampled_from(["", " ", "a", "b", None]), st.booleans()),
        max_size=9,
    ),
    best=st.booleans(),
)
def test_threads_of_any_messages(drawn, best):
    """Parents anywhere: missing, later, in a circle."""
    messages = [
        {"message_id": str(n), "parent_id": None if parent is None else str(parent), "role": role, "text": text,
         "message_tree_id": "t", "lang": "en", "rank": n % 3 or None, "deleted": deleted, "review_result": True}
        for n, (parent, role, text, deleted) in enumerate(drawn)
    ]  # fmt: skip
    chosen = {"languages": None, "threads": "best" if best else "all", "deleted": "drop", "review": "all"}
    try:
        threads, facts = threads_of(messages, chosen)
    except ValueError as error:
        assert "their own ancestors" in str(error)
        return
    assert facts["messages"] == len(messages) and len(set(threads)) == len(threads)
    for thread in threads:
        assert len(thread) % 2 == 0 and all(text.strip() == text and text for text in thread)
    left_out = ("misordered_threads", "unanswered_threads", "repeated_threads")
    assert len(threads) == facts["threads"] - sum(facts[name] for name in left_out)


@given(
    text=st.text("[]/INST<s> ab", max_size=30),
    marks=st.sets(st.sampled_from(["[INST]", "[/INST]", "<s>", "</s>", "[", "<<"])),
)
def test_no_mark_is_left_in_a_message(text, marks):
    found = escape(text, marks)
    assert not [mark for mark in marks if len(mark) > 1 and mark in found]
    assert found.replace(" ", "") == text.replace(" ", "")
