"""Generated tasks: GLUE's format, determinism, and labels that a bag of words can't tell."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.generated import write_corpus, write_task

TASKS = ("cola", "mrpc", "stsb")
TRAIN, VALIDATION = 2000, 400


def split_files(folder, task):
    return [folder / task / f"{split}-00000-of-00001.parquet" for split in ("train", "validation")]


def texts(table):
    return list(zip(*(table[name].to_pylist() for name in table.column_names if "sentence" in name), strict=True))


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """``glue[task]``: the training and validation tables of every task."""
    folder = tmp_path_factory.mktemp("generated")
    for task in TASKS:
        write_task(task, folder, TRAIN, VALIDATION, seed=0)
    return {task: [pq.read_table(file) for file in split_files(folder, task)] for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_columns_and_types_are_glues(glue, task):
    names = ["sentence"] if task == "cola" else ["sentence1", "sentence2"]
    kinds = [pa.string()] * len(names) + [pa.float32() if task == "stsb" else pa.int64(), pa.int32()]
    for table, rows in zip(glue[task], (TRAIN, VALIDATION), strict=True):
        assert list(zip(table.schema.names, table.schema.types, strict=True)) == list(
            zip([*names, "label", "idx"], kinds, strict=True)
        )
        assert table["idx"].to_pylist() == list(range(rows))


@pytest.mark.parametrize("task", TASKS)
def test_training_and_validation_share_no_text_and_repeat_none(glue, task):
    train, validation = (texts(table) for table in glue[task])
    assert len(set(train)) == TRAIN
    assert len(set(validation)) == VALIDATION
    assert not set(train) & set(validation)


def test_labels_are_balanced_or_graded(glue):
    for table in (*glue["cola"], *glue["mrpc"]):
        labels = table["label"].to_pylist()
        assert set(labels) == {0, 1} and 0.4 < sum(labels) / len(labels) < 0.6
    labels = glue["stsb"][0]["label"].to_pylist()
    assert min(labels) >= 0 and max(labels) <= 5 and len({round(label) for label in labels}) >= 5


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_everything(tmp_path, task):
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_task(task, tmp_path / name, 60, 20, seed)
    first, again, other = (
        [file.read_bytes() for file in split_files(tmp_path / name, task)] for name in ("first", "again", "other")
    )
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_the_corpus_has_one_sentence_a_line_and_follows_the_seed(tmp_path):
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_corpus(tmp_path / name, 200, seed)
    first, again, other = ((tmp_path / name).read_text() for name in ("first", "again", "other"))
    assert first == again != other
    assert len(first.splitlines()) == 200
    assert all(len(line.split()) >= 5 for line in first.splitlines())


@pytest.mark.parametrize("task", TASKS)
def test_a_bag_of_words_is_close_to_guessing(glue, task):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    counts = CountVectorizer(token_pattern=r"\b\w+\b")
    words = [[" ".join(pair) for pair in texts(table)] for table in glue[task]]
    train, validation = (table["label"].to_pylist() for table in glue[task])
    model = Ridge() if task == "stsb" else LogisticRegression(max_iter=2000)
    model.fit(counts.fit_transform(words[0]), train)
    inputs = counts.transform(words[1])
    if task == "stsb":
        assert abs(np.corrcoef(model.predict(inputs), validation)[0, 1]) < 0.3
    else:
        assert model.score(inputs, validation) < 0.6


def test_an_unknown_task_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"task='sst2'; the grammar has: cola, mrpc, stsb"):
        write_task("sst2", tmp_path, 10, 10, seed=0)
    assert not list(tmp_path.iterdir())
