"""OpenAssistant's message trees: what is read, which threads they hold, what is dropped and counted or refused."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.threads import read_messages, threads_of

ROOT = Path(os.environ.get("SPARSEGRAD_DATA") or Path(__file__).parents[3] / "data")


def message(name, parent=None, role=None, tree="t", **changes):
    """A message; one with a name of even length asks."""
    role = role or ("assistant" if len(name) % 2 else "prompter")
    row = {"message_id": name, "parent_id": parent, "text": f" {name}\n", "role": role, "message_tree_id": tree}
    row |= {"lang": "en", "rank": None, "deleted": False, "review_result": True}
    return row | changes


def tree(tree="t"):
    """Two questions below the first answer, two answers to one of them, none to the other."""
    return [
        message("q1", tree=tree),
        message("a11", "q1", tree=tree, rank=1),
        message("a12", "q1", tree=tree, rank=0),
        message("qq21", "a11", tree=tree),
        message("qq22", "a11", tree=tree),
        message("aaa21", "qq21", tree=tree),
        message("aaa22", "qq21", tree=tree, lang="de"),
    ]


@pytest.fixture
def options(compose):
    """``options(root, ...)``: the composed group ``oasst1`` on a folder."""

    def make(root="nowhere", **changes):
        return compose("chat=oasst1", f"chat.root={root}", config_name="chat")["chat"] | changes

    return make


@pytest.fixture
def write(tmp_path):
    """``write(rows, "data/train-00000-of-00001.parquet", ...)``: rows below the folder ``oasst1``; returns the root."""

    def make(rows, *names):
        for name in names or ("messages.parquet",):
            file = tmp_path / "oasst1" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), file)
        return tmp_path

    return make


def test_threads_run_from_the_root_to_every_leaf_and_end_with_an_answer(options):
    threads, facts = threads_of(tree(), options())
    assert threads == [("q1", "a11", "qq21", "aaa21"), ("q1", "a11", "qq21", "aaa22"), ("q1", "a11"), ("q1", "a12")]
    assert (facts["messages"], facts["trees"], facts["threads"], facts["cut_prompts"]) == (7, 1, 4, 1)
    assert facts["repeated_threads"] == facts["unanswered_threads"] == facts["orphaned_messages"] == 0


def test_the_best_ranked_reply_is_followed(options):
    threads, facts = threads_of(tree(), options(threads="best"))
    assert threads == [("q1", "a12")]
    assert (facts["threads"], facts["orphaned_messages"]) == (1, 0)
    unranked = [row | {"rank": None} for row in tree()]
    assert threads_of(unranked, options(threads="best"))[0] == [("q1", "a11", "qq21", "aaa21")]
    last = [row | {"rank": None if row["message_id"] == "a12" else row["rank"]} for row in tree()]
    assert threads_of(last, options(threads="best"))[0] == [("q1", "a11", "qq21", "aaa21")]


def test_questions_without_answers_are_cut_and_counted(options):
    rows = [message("q1"), message("a11", "q1"), message("qq21", "a11"), message("qq22", "a11")]
    threads, facts = threads_of(rows, options())
    assert threads == [("q1", "a11")]  # once, though two threads are that once cut
    assert (facts["threads"], facts["cut_prompts"], facts["repeated_threads"]) == (2, 2, 1)
    threads, facts = threads_of([message("q1"), message("q2")], options())
    assert threads == [] and facts["unanswered_threads"] == facts["threads"] == 2


CUT = {"cut_prompts": 1, "unanswered_threads": 1}  # the question that lost its only answer


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"parent_id": "gone"}, {"orphaned_messages": 4} | CUT),
        ({"text": " \n"}, {"empty_messages": 1, "orphaned_messages": 3} | CUT),
        ({"text": None}, {"empty_messages": 1, "orphaned_messages": 3} | CUT),
        ({"lang": "fr"}, {"filtered_messages": 1, "orphaned_messages": 3} | CUT),
        ({"deleted": True}, {"filtered_messages": 1, "orphaned_messages": 3} | CUT),
        ({"review_result": False}, {"filtered_messages": 1, "orphaned_messages": 3} | CUT),
        ({"review_result": None}, {"filtered_messages": 1, "orphaned_messages": 3} | CUT),
        ({"role": "prompter"}, {"misordered_threads": 2}),
    ],
    ids=str,
)
def test_what_is_dropped_is_counted_with_all_that_hangs_on_it(change, counts, options):
    rows = [row for row in tree() if row["message_id"] not in ("a12", "qq22")]
    rows = [row | change if row["message_id"] == "a11" else row for row in rows]
    rows += [message("q0"), message("a01", "q0")]
    threads, facts = threads_of(rows, options(languages=["en", "de"], deleted="drop", review="passed"))
    assert threads == [("q0", "a01")]
    found = {name: count for name, count in facts.items() if count and name not in ("messages", "trees", "threads")}
    assert found == counts


def test_filters_are_off_as_in_the_released_code(options):
    found = options()
    assert (found["languages"], found["threads"], found["deleted"], found["review"]) == (None, "all", "keep", "all")
    rows = [row | {"deleted": True, "review_result": False} for row in tree()]
    assert threads_of(rows, found)[0] == threads_of(tree(), found)[0]


@pytest.mark.parametrize("cycle", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_messages_that_are_their_own_ancestors_are_refused(cycle, options):
    loop = [message(name, parent) for name, parent in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
    with pytest.raises(ValueError, match="messages are their own ancestors, such as [abc]; the file is damaged"):
        threads_of([*tree(), *loop, message("below", "a")], options())


def test_a_deep_tree_needs_no_recursion(options):
    roles = ("prompter", "assistant")
    rows = [message(str(n), str(n - 1) if n else None, roles[n % 2], text=f"m{n}") for n in range(4000)]
    threads, _ = threads_of(rows, options())
    assert [len(thread) for thread in threads] == [4000]


# Files


@pytest.mark.parametrize("name", ["data/{}-00000-of-00001-b42a775f407cee45.parquet", "{}-00000-of-00001.parquet"])
def test_layouts_of_the_hub(name, write, options):
    write(tree("one"), name.format("train"))
    root = write(tree("two"), name.format("validation"))
    found = read_messages(options(root))
    assert {name: {row["message_tree_id"] for row in split.rows} for name, split in found.items()} == {
        "train": {"one"},
        "validation": {"two"},
    }
    assert found["train"].sha256 != found["validation"].sha256


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["data/train-00000-of-00002.parquet"], r"data has train-00000-of-00002.parquet; each shard 0 to 1 is needed"),
        (["train-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], r"has train-\*.parquet and data/train"),
        (["messages.parquet", "train-00000-of-00001.parquet"], "has train-00000-of-00001.parquet beside it; keep"),
        (
            ["messages.parquet", "messages (1).parquet"],
            r"messages.parquet has messages \(1\).parquet beside it; keep",
        ),
    ],
)
def test_files_that_are_there_in_part_or_twice_are_refused(names, told, write, options):
    with pytest.raises(ValueError, match=told):
        read_messages(options(write(tree("one"), *names)))


def test_shards_of_one_export_are_read_in_order(write, options):
    write(tree("one"), "data/train-00000-of-00002.parquet")
    write([row | {"message_id": f"x{row['message_id']}"} for row in tree("three")], "data/train-00001-of-00002.parquet")
    root = write(tree("two"), "data/validation-00000-of-00001.parquet")
    assert len(read_messages(options(root))["train"].rows) == 14


def forest(number):
    def renamed(name, row):
        return row | {key: row[key] and f"{name}{row[key]}" for key in ("message_id", "parent_id")}

    return [renamed(f"t{n}", row) for n in range(number) for row in tree(f"t{n}")]


def test_trees_of_one_file_are_split_whole_by_a_hash(write, options):
    root = write(forest(200))
    found = read_messages(options(root, validation_share=0.2))
    train, validation = ({row["message_tree_id"] for row in found[name].rows} for name in ("train", "validation"))
    assert not train & validation and len(train | validation) == 200
    assert 20 <= len(validation) <= 60
    # The hash is of the tree's id alone: other trees change nothing.
    half = read_messages(options(write(forest(100)), validation_share=0.2))
    assert {row["message_tree_id"] for row in half["validation"].rows} == {
        name for name in validation if int(name[1:]) < 100
    }
    larger = read_messages(options(root, validation_share=0.5))["validation"].rows
    assert {row["message_tree_id"] for row in larger} >= {name for name in validation if int(name[1:]) < 100}


@pytest.mark.parametrize(
    ("share", "message"),
    [
        *((share, f"validation_share={share}; messages.parquet is one file") for share in (None, 0, 1, 1.5)),
        (0.01, "the validation split has no messages; chat.validation_share"),
    ],
)
def test_a_share_that_splits_nothing_is_refused(share, message, write, options):
    with pytest.raises(ValueError, match=message):
        read_messages(options(write(tree()), validation_share=share))


def test_a_tree_in_both_splits_is_refused(write, options):
    root = write(tree("one"), "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="1 trees are in both splits, such as one"):
        read_messages(options(root))


@pytest.mark.parametrize("column", ["message_id", "parent_id", "text", "role", "message_tree_id"])
def test_a_missing_column_names_what_the_file_has(column, write, options):
    rows = [{name: value for name, value in row.items() if name != column} for row in tree()]
    with pytest.raises(ValueError, match=rf"columns \['{column}'\] are missing; the file has .+, needed"):
        read_messages(options(write(rows)))


@pytest.mark.parametrize(
    ("column", "changes"),
    [
        ("lang", {"languages": ["en"]}),
        ("rank", {"threads": "best"}),
        ("deleted", {"deleted": "drop"}),
        ("review_result", {"review": "passed"}),
    ],
)
def test_a_column_is_needed_only_by_its_option(column, changes, write, options):
    rows = [{name: value for name, value in row.items() if name != column} for row in forest(40)]
    root = write(rows)
    assert read_messages(options(root, validation_share=0.5))
    with pytest.raises(ValueError, match=rf"columns \['{column}'\] are missing"):
        read_messages(options(root, validation_share=0.5, **changes))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"role": "system"}, r"roles \['system'\] are unknown; allowed: prompter, assistant"),
        ({"role": None}, "column role has empty cells"),
        ({"message_tree_id": None}, "column message_tree_id has empty cells"),
        ({"message_id": "a11"}, "1 message ids repeat, such as a11; the file is damaged"),
    ],
)
def test_damaged_messages_are_refused(change, text, write, options):
    rows = [row | change if row["message_id"] == "qq21" else row for row in tree()]
    with pytest.raises(ValueError, match=text):
        read_messages(options(write(rows)))


def test_an_empty_folder_and_a_torn_file_say_what_to_do(tmp_path, options):
    folder = tmp_path / "oasst1"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"has no train-\*.parquet, nor data/train-\*.parquet as on the hub, nor mess"):
        read_messages(options(tmp_path))
    (folder / "messages.parquet").write_bytes(b"PAR1torn")
    with pytest.raises(ValueError, match="is no readable parquet .+; fetch it again"):
        read_messages(options(tmp_path))


def test_without_a_folder_a_source_is_asked_or_the_stage_named(tmp_path, options, monkeypatch):
    import datasets

    parts = {"train": tree("one"), "validation": tree("two")}

    def load_dataset(source, split, revision):
        if not parts:
            raise ConnectionError("no network")
        return datasets.Dataset(pa.Table.from_pylist(parts[split]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_messages(options(tmp_path))
    assert len(found["train"].rows) == 7
    assert found["train"].sha256 == "OpenAssistant/oasst1@fdf72ae0827c1cda404aff25b6603abec9e3399b"
    parts.clear()
    with pytest.raises(ValueError, match=r"could not be loaded from the hub \(ConnectionError: no network\). Set data"):
        read_messages(options(tmp_path))
    with pytest.raises(ValueError, match="the stage that generates oasst1 writes it"):
        read_messages(options(tmp_path, source=None))


def test_the_real_trees(options):
    if not (ROOT / "oasst1").is_dir():
        pytest.skip(f"{ROOT} has no folder oasst1: experiments/fetch.py brings it")
    found = read_messages(options(ROOT))
    facts = [threads_of(split.rows, options())[1] for split in found.values()]
    total = {name: sum(part[name] for part in facts) for name in facts[0]}
    if (ROOT / "oasst1" / "messages.parquet").is_file():
        assert (total["messages"], total["trees"], total["threads"], total["cut_prompts"]) == (1167, 100, 626, 226)
    assert total["orphaned_messages"] == total["misordered_threads"] == total["empty_messages"] == 0
