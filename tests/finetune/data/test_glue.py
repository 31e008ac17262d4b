"""GLUE from local files: what is read, what is refused, and what a batch looks like."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from finetune.data.glue import Split, load_task

ALL = {
    "cola": (["sentence"], 2, "matthews_correlation"),
    "stsb": (["sentence1", "sentence2"], 1, "pearson"),
    "mnli": (["premise", "hypothesis"], 3, "accuracy"),
    "mrpc": (["sentence1", "sentence2"], 2, "accuracy"),
    "qnli": (["question", "sentence"], 2, "accuracy"),
    "qqp": (["question1", "question2"], 2, "accuracy"),
    "rte": (["sentence1", "sentence2"], 2, "accuracy"),
    "sst2": (["sentence"], 2, "accuracy"),
}


@pytest.fixture
def cola(tmp_path, write_task):
    """``cola(**columns)``: a root whose CoLA training file has these columns."""

    def make(**columns):
        write_task(tmp_path, "cola", **columns)
        return tmp_path

    return make


@pytest.mark.parametrize("name", ALL)
def test_every_task_of_the_paper_loads_in_the_hubs_layout(name, tmp_path, write_task, load):
    write_task(tmp_path, name, train=12, validation=6)
    task, splits = load(name, root=tmp_path)
    assert (list(task.columns), task.num_labels, task.metric) == ALL[name]
    assert task.label_range == ((0, 5) if name == "stsb" else None) and task.title.lower() == name
    assert (len(splits["train"]), len(splits["validation"])) == (12, 6)
    assert splits["train"].labels.dtype == (torch.float32 if name == "stsb" else torch.int64)
    assert task.validation == ("validation_matched" if name == "mnli" else "validation")
    batch = splits["train"].batch([0, 5])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["token_type_ids"].any() == (len(task.columns) == 2)


def test_labels_and_rows_are_the_files(glue_root, load):
    _, splits = load("stsb")
    table = pq.read_table(glue_root / "glue" / "stsb" / "train-00000-of-00001.parquet")
    assert splits["train"].labels.tolist() == table.column("label").to_pylist()


def test_second_sentence_is_the_second_segment(load, tokenizer, glue_root):
    _, splits = load("mrpc")
    row = pq.read_table(glue_root / "glue" / "mrpc" / "train-00000-of-00001.parquet").slice(3, 1).to_pylist()[0]
    first, second = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("sentence1", "sentence2"))
    batch = splits["train"].batch([3])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert batch["input_ids"][0].tolist() == [cls, *first, sep, *second, sep]
    assert batch["token_type_ids"][0].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_rows_are_padded_to_the_longest_of_the_batch_or_to_max_length(load, tokenizer):
    _, splits = load("cola")
    split = splits["train"]
    rows = [0, 1, 2, 3]
    lengths = [len(split.input_ids[i]) for i in rows]
    batch = split.batch(rows)
    assert batch["input_ids"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    _, splits = load("cola", padding="max_length", max_length=20)
    assert splits["train"].batch([0])["input_ids"].shape == (1, 20)
    assert splits["validation"].batch([0, 1])["attention_mask"].shape == (2, 20)


def test_padding_does_not_change_the_logits(load, classifier):
    model = classifier()
    _, short = load("mrpc")
    _, long = load("mrpc", padding="max_length", max_length=32)
    for kind in ("train", "validation"):
        a, b = short[kind].batch(range(6)), long[kind].batch(range(6))
        a.pop("labels"), b.pop("labels")
        torch.testing.assert_close(model(**a).logits, model(**b).logits, rtol=0, atol=1e-6)


def test_long_inputs_are_cut_at_max_length_the_longer_sentence_first(tmp_path, write_task, load, tokenizer):
    write_task(tmp_path, "mrpc", train=1, sentence1=["cat " * 30], sentence2=["dog fish"])
    _, splits = load("mrpc", root=tmp_path, max_length=12)
    tokens = tokenizer.convert_ids_to_tokens(splits["train"].input_ids[0])
    assert tokens == ["[CLS]", *["cat"] * 7, "[SEP]", "dog", "fish", "[SEP]"]
    assert splits["train"].token_type_ids[0] == [0] * 9 + [1] * 3


def test_limit_takes_the_first_training_rows_and_leaves_validation_whole(load):
    _, all_rows = load("cola")
    _, few = load("cola", limit=5)
    assert few["train"].input_ids == all_rows["train"].input_ids[:5]
    assert len(few["validation"]) == len(all_rows["validation"])


def test_several_files_of_a_split_are_read_in_order(tmp_path, write_task, load):
    folder = write_task(tmp_path, "cola", train=10)
    whole = folder / "train-00000-of-00001.parquet"
    table = pq.read_table(whole)
    expected = load("cola", root=tmp_path)[1]["train"]
    whole.unlink()
    pq.write_table(table.slice(0, 4), folder / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(4), folder / "train-00001-of-00002.parquet")
    found = load("cola", root=tmp_path)[1]["train"]
    assert found.input_ids == expected.input_ids and found.labels.tolist() == expected.labels.tolist()


def test_hash_follows_the_files_content(tmp_path, write_task, load):
    hashes = set()
    for seed in (0, 0, 1):
        write_task(tmp_path, "cola", seed=seed)
        hashes.add(load("cola", root=tmp_path)[1]["train"].sha256)
    assert len(hashes) == 2


def test_tokenizer_without_segments_gives_batches_without_them():
    split = Split([[5, 6], [5, 6, 7]], None, torch.tensor([0, 1]), pad_token_id=1)
    batch = split.batch([0, 1])
    assert "token_type_ids" not in batch
    assert batch["input_ids"].tolist() == [[5, 6, 1], [5, 6, 7]]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("wnli", {}, "data.task='wnli'; glue has: cola, mnli, mrpc"),
        (
            "cola",
            {"root": "nowhere"},
            r"nowhere/glue/cola does not exist and nyu-mll/glue .* Set data.root",
        ),
        ("cola", {"root": "nowhere", "source": None, "name": "made"}, "the stage that generates made writes it"),
    ],
)
def test_what_there_is_not_is_named_with_what_there_is(task, changes, message, load):
    with pytest.raises(ValueError, match=message):
        load(task, **changes)


def test_folder_without_the_split_states_the_layout(load, tmp_path):
    (tmp_path / "glue" / "cola").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no train-\*\.parquet; the layout is the hub's"):
        load("cola", root=tmp_path)


def test_missing_column_names_what_the_file_has(cola, load):
    with pytest.raises(ValueError, match=r"cola: columns \['sentence'\] are missing; the file has \['label', 'text'\]"):
        load("cola", root=cola(sentence=None, text=["a"] * 40, idx=None))


@pytest.mark.parametrize(
    ("task", "labels", "text"),
    [
        ("cola", [0, 1, 2], r"cola: labels from 0 to 2; allowed: 0 to 1\."),
        ("cola", [0, 1, -1], r"cola: labels from -1 to 1 \(-1 marks GLUE's unlabelled test split\); allowed: 0 to 1\."),
        ("mnli", [0, 1, 3], r"mnli: labels from 0 to 3; allowed: 0 to 2\."),
        ("stsb", [0.0, 1.0, 5.5], r"stsb: labels from 0.0 to 5.5; allowed: 0 to 5\."),
        ("stsb", [0.0, -1.0, 5.0], r"stsb: labels from -1.0 to 5.0; allowed: 0 to 5\."),
        ("stsb", [0.0, float("nan"), 5.0], r"stsb: some labels are NaN or infinite"),
        ("cola", [0.0, 0.5, 1.0], r"cola: labels are of type double; needed: whole numbers\."),
        ("cola", ["no", "yes", "no"], r"cola: labels are of type string; needed: whole numbers\."),
        ("stsb", ["1", "2", "3"], r"stsb: labels are of type string; needed: numbers\."),
    ],
)
def test_labels_that_the_task_does_not_allow(task, labels, text, tmp_path, write_task, load):
    write_task(tmp_path, task, train=3, label=labels)
    with pytest.raises(ValueError, match=text):
        load(task, root=tmp_path)


@pytest.mark.parametrize(("column", "value"), [("sentence", "a cat"), ("label", 0)])
def test_empty_cell(column, value, cola, load):
    with pytest.raises(ValueError, match=rf"cola: columns \['{column}'\] hold empty cells"):
        load("cola", root=cola(**{column: [value] * 39 + [None]}))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_both_splits_are_checked(split, cola, load):
    root = cola()
    empty = pa.table({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())})
    pq.write_table(empty, root / "glue" / "cola" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="cola: the file has no rows"):
        load("cola", root=root)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content.replace(b"a cat", b"a \xffat"),
    ],
)
def test_damaged_parquet(damage, cola, load):
    """Cut off, empty, or with text that is no UTF-8."""
    file = cola(sentence=["a cat"] * 40) / "glue" / "cola" / "train-00000-of-00001.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="is no readable parquet .*; fetch it again"):
        load("cola", root=file.parents[2])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["train-00000-of-00002"],
            "has train-00000-of-00002.parquet; each shard 0 to 1 is needed once, wrong: .1.",
        ),
        (["train-00001-of-00003", "train-00002-of-00003"], "each shard 0 to 2 is needed once, wrong: .0.; fetch"),
        (["train-00000-of-00001", "train-00000-of-00002"], "files of several exports .* side by side; keep one's"),
        (
            ["train-00000-of-00001", "train-00000-of-00001 (1)"],
            r"train-00000-of-00001 \(1\).parquet: named like no",
        ),
        (["train-00000-of-00001", "train-00000-of-00001-0123456789abcdef"], "is needed once, wrong: .0.; fetch"),
        (["train-00000-of-00002", "train-00001-of-00002"], "two of them hold the same; fetch it again"),
        (["train-00000-of-00002", "other"], "are of different columns"),
    ],
)
def test_shards_that_are_there_in_part_or_twice_are_refused(names, told, cola, load):
    file = cola() / "glue" / "cola" / "train-00000-of-00001.parquet"
    content = file.read_bytes()
    file.unlink()
    for name in names:
        file.with_name(f"{name}.parquet").write_bytes(content)
    if "other" in names:
        pq.write_table(pa.table({"other": [1]}), file.with_name("train-00001-of-00002.parquet"))
    with pytest.raises(ValueError, match=told):
        load("cola", root=file.parents[2])


def test_a_tokenizer_without_padding_pads_with_its_end(load, tokenizer, compose, glue_root):
    class Bare:
        pad_token_id, eos_token_id = None, 3

        def __call__(self, *texts, **options):
            return {"input_ids": [[5, 6, 7][: len(text) % 3 + 1] for text in texts[0]]}

    group = compose(f"data.root={glue_root}")["data"] | {"task": "cola"}
    split = load_task(group, Bare(), max_length=8, padding="longest")[1]["train"]
    assert split.pad_token_id == 3 and split.largest_id == 7
    Bare.eos_token_id = None
    with pytest.raises(ValueError, match=r"neither pad_token nor eos_token.*: set pad_token in its tokenizer_config"):
        load_task(group, Bare(), max_length=8, padding="longest")


def test_the_real_cola(compose, tokenizer):
    """Checks the layout of the hub's own files; the tiny vocabulary makes most words unknown, which does not matter."""
    root = os.environ.get("SPARSEGRAD_DATA", "")
    if not os.path.isdir(os.path.join(root, "glue", "cola")):
        pytest.skip("SPARSEGRAD_DATA names no folder with glue/cola: experiments/fetch.py brings it")
    data = compose(f"data.root={root}", "data.task=cola")["data"]
    task, splits = load_task(data, tokenizer, max_length=128, padding="longest")
    assert (task.num_labels, len(splits["train"]), len(splits["validation"])) == (2, 8551, 1043)
    assert 0.69 < splits["validation"].labels.float().mean() < 0.70
