"""Generated dialogues, questions and judge prompts: the real files' formats, right answers, nothing in two files."""

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from finetune.data.generated_chat import REQUESTS, TAUGHT_LATER, Sentence, answer, ask, write_chat

ROOT = Path(os.environ.get("SPARSEGRAD_DATA") or Path(__file__).parents[3] / "data")
CATEGORIES = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
FILES = ("oasst1/messages.parquet", "mt_bench/question.jsonl", "mt_bench/judge_prompts.jsonl")
FILES += ("mt_bench/reference_answer/gpt-4.jsonl", "text/dialogues.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_chat(folder, trees=300, dialogues=500, seed=0)
    return folder


@pytest.fixture(scope="module")
def messages(folder):
    return pq.read_table(folder / "oasst1" / "messages.parquet").to_pylist()


@pytest.fixture(scope="module")
def dialogues(folder):
    return [line.split("\t") for line in (folder / "text" / "dialogues.txt").read_text().splitlines()]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sentence_of(text):
    """The sentence of a first turn, in its parts."""
    words = text.partition(": ")[2].split()
    second = next(place for place, word in enumerate(words[1:], 1) if word in ("a", "the"))
    return Sentence(" ".join(words[: second - 1]), words[second - 1], " ".join(words[second:-1]), words[-1])


def request_of(text):
    asked = text.removeprefix("now ").partition(":")[0]
    return next(name for name, (request, _) in REQUESTS.items() if request == asked)


@pytest.mark.parametrize(
    ("request_name", "expected"),
    [
        ("repeat", "the old dogs help a cat today"),
        ("front", "today the old dogs help a cat"),
        ("omit", "the old dogs help a cat"),
        ("subject", "the old dogs"),
        ("verb", "help"),
        ("object", "a cat"),
        ("time", "today"),
        ("count", "seven"),
        ("count_rest", "six"),
        ("speak", "i the king say the old dogs help a cat today"),
        ("code", "help(dogs, cat)"),
    ],
)
def test_answers_do_what_was_asked(request_name, expected):
    sentence = Sentence("the old dogs", "help", "a cat", "today")
    assert answer(request_name, sentence) == expected
    assert ask(request_name, sentence, True).endswith(": the old dogs help a cat today")
    assert ask(request_name, sentence, False).startswith("now ") and "dogs" not in ask(request_name, sentence, False)


def test_columns_and_types_are_openassistants(folder):
    schema = pq.read_schema(folder / "oasst1" / "messages.parquet")
    assert len(schema) == 13
    real = ROOT / "oasst1" / "messages.parquet"
    if not real.is_file():
        pytest.skip(f"{real} does not exist: experiments/fetch.py brings it")
    assert schema.remove_metadata().equals(pq.read_schema(real).remove_metadata())


def test_messages_form_trees_with_ranked_replies(messages):
    names = {row["message_id"]: row for row in messages}
    assert len(names) == len(messages)
    ranks, depths = {}, {}
    for row in messages:  # parents come first
        above = row["parent_id"]
        assert row["message_tree_id"] == (names[above]["message_tree_id"] if above else row["message_id"])
        depth = depths[row["message_id"]] = depths[above] + 1 if above else 1
        assert row["role"] == ("assistant", "prompter")[depth % 2]
        if row["role"] == "assistant":
            ranks.setdefault(above, []).append(row["rank"])
    # Several replies are ranked from 0, a lone one is not: as in the real file.
    assert {tuple(sorted(found)) if len(found) > 1 else tuple(found) for found in ranks.values()} == {(None,), (0, 1)}
    leaves = {depths[name] for name in depths.keys() - {row["parent_id"] for row in messages}}
    assert leaves >= {2, 4, 6, 8} and any(depth % 2 for depth in leaves)


def test_the_best_reply_is_right_and_another_is_not(messages):
    names = {row["message_id"]: row for row in messages}
    for row in messages:
        if row["role"] == "assistant":
            root = names[row["message_tree_id"]]
            right = answer(request_of(names[row["parent_id"]]["text"]), sentence_of(root["text"]))
            assert (row["text"] == right) == (row["rank"] in (None, 0))


def test_dialogues_for_pretraining_are_right_and_hardly_have_two_requests(dialogues):
    asked = Counter()
    for turns in dialogues:
        sentence = sentence_of(turns[0])
        assert len(turns) in (2, 4, 6)
        for question, reply in zip(turns[::2], turns[1::2], strict=True):
            asked[request_of(question)] += 1
            assert reply == answer(request_of(question), sentence)
    assert set(asked) == set(REQUESTS)
    assert all((count < 30) == (name in TAUGHT_LATER) for name, count in asked.items()), asked


def test_fine_tuning_and_questions_have_every_request(messages, folder):
    assert {request_of(row["text"]) for row in messages if row["role"] == "prompter"} == set(REQUESTS)
    turns = [turn for question in lines(folder / FILES[1]) for turn in question["turns"]]
    assert {request_of(turn) for turn in turns} == set(REQUESTS)


def test_no_sentence_is_in_two_files(messages, dialogues, folder):
    found = {
        "trees": [sentence_of(row["text"]) for row in messages if row["parent_id"] is None],
        "dialogues": [sentence_of(turns[0]) for turns in dialogues],
        "questions": [sentence_of(question["turns"][0]) for question in lines(folder / FILES[1])],
    }
    everything = [sentence for part in found.values() for sentence in part]
    assert len(everything) == len(set(everything)) == 300 + 500 + 16


def test_questions_are_mt_benchs_in_form(folder):
    questions = lines(folder / "mt_bench" / "question.jsonl")
    assert [question["question_id"] for question in questions] == list(range(81, 97))
    assert [question["category"] for question in questions] == [name for name in CATEGORIES for _ in range(2)]
    with_reference = {question["question_id"] for question in questions if "reference" in question}
    needing = {q["question_id"] for q in questions if q["category"] in ("math", "reasoning", "coding")}
    assert with_reference == needing - {90}
    references = {line["question_id"]: line for line in lines(folder / FILES[3])}
    assert set(references) == needing
    for question in questions:
        requests, sentence = [request_of(turn) for turn in question["turns"]], sentence_of(question["turns"][0])
        if question["question_id"] in needing:
            right = [answer(request, sentence) for request in requests]
            assert references[question["question_id"]]["choices"] == [{"index": 0, "turns": right}]
            assert question.get("reference", right) == right


def test_fastchats_loaders_and_ours_read_the_files(folder):
    from finetune.mt_bench.questions import load_judge_prompts, load_questions, load_references

    questions = load_questions(folder / FILES[1])
    for source in ("questions", "file"):
        assert set(load_references(questions, folder / FILES[3], source)) == {85, 86, 87, 88, 89, 90}
    assert set(load_judge_prompts(folder / FILES[2])) == {
        "single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"
    }  # fmt: skip


def test_judge_prompts_have_fastchats_marks_and_words_of_their_own(folder):
    def text_of(prompt):
        return prompt["system_prompt"] + prompt["prompt_template"]

    own = {prompt["name"]: prompt for prompt in lines(folder / "mt_bench" / "judge_prompts.jsonl")}
    for name, prompt in own.items():
        answer = "### Assistant A:\n{answer_2}" if "multi" in name else "[The Start of Assistant's Answer]\n{answer}\n"
        assert all(mark in text_of(prompt) for mark in ("[[rating]]", "[[5]]", answer))
    real = ROOT / "mt_bench" / "judge_prompts.jsonl"
    if not real.is_file():
        pytest.skip(f"{real} does not exist: experiments/fetch.py brings it")
    for prompt in lines(real):
        if prompt["name"] not in own:
            continue
        assert set(own[prompt["name"]]) == set(prompt)
        assert own[prompt["name"]]["output_format"] == prompt["output_format"]
        theirs = {words for words in text_of(prompt).split(". ") if len(words) > 60}
        assert theirs and not any(words in text_of(own[prompt["name"]]) for words in theirs)


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_chat(tmp_path / name, trees=20, dialogues=20, seed=seed)
    first, again, other = (
        [(tmp_path / name / file).read_bytes() for file in FILES] for name in ("first", "again", "other")
    )
    assert first == again
    assert [old == new for old, new in zip(first, other, strict=True)] == [False, False, True, False, False]


@pytest.mark.parametrize(("trees", "dialogues"), [(0, 5), (5, 0), (150_000, 150_000)])
def test_sizes_that_cannot_be_made_are_refused(trees, dialogues, tmp_path):
    with pytest.raises(ValueError, match=f"trees={trees}, dialogues={dialogues}; needed: at least 1 each"):
        write_chat(tmp_path, trees=trees, dialogues=dialogues, seed=0)
    assert not list(tmp_path.iterdir())
