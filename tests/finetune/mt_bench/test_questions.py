"""Questions, references, judge prompts: the published files load as FastChat loads them; wrong ones are named."""

import os
from pathlib import Path

import judge_endpoint as bench
import pytest

from finetune.mt_bench.questions import (
    PROMPT_FIELDS,
    load_answers,
    load_judge_prompts,
    load_questions,
    load_references,
    temperature,
)

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("SPARSEGRAD_DATA", ROOT / "data")) / "mt_bench"
real = pytest.mark.skipif(
    not (REAL / "mt_bench_inf.jsonl").is_file(), reason=f"no MT-Bench at {REAL}: experiments/fetch.py brings it"
)


@pytest.fixture
def write(tmp_path):
    return lambda *items: bench.write_lines(tmp_path / "file.jsonl", items)


@real
@pytest.mark.parametrize("file", ["mt_bench_inf.jsonl", "question.jsonl"])
def test_the_published_questions_load(file):
    from fastchat.llm_judge import common

    questions = load_questions(REAL / file)
    assert questions == common.load_questions(str(REAL / file), None, None)
    assert [question["question_id"] for question in questions] == list(range(81, 161))
    assert sorted({temperature(question) for question in questions}) == [0.0, 0.1, 0.7]


@real
def test_references_are_inflections_own_but_for_question_123():
    questions = load_questions(REAL / "mt_bench_inf.jsonl")
    file = load_answers(REAL / "reference_answer/gpt-4.jsonl")
    references = load_references(questions, REAL / "reference_answer/gpt-4.jsonl", "questions")
    assert sorted(references) == sorted(file) and len(references) == 30
    own = {question["question_id"]: question.get("reference") for question in questions}
    for number, reference in references.items():
        turns = reference["choices"][0]["turns"]
        assert turns == (file[123]["choices"][0]["turns"] if number == 123 else own[number])
    assert "one brother" in file[104]["choices"][0]["turns"][0]
    assert references[104]["choices"] != file[104]["choices"]
    assert load_references(questions, REAL / "reference_answer/gpt-4.jsonl", "file") == file


@real
def test_the_published_judge_prompts_load():
    assert set(PROMPT_FIELDS) < set(load_judge_prompts(REAL / "judge_prompts.jsonl"))


QUESTION = {"question_id": 1, "category": "math", "turns": ["one", "two"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": ["one"]}, "question 1 has turns"),
        ({"turns": ["one", " "]}, "question 1 has turns"),
        ({"turns": ["one", "two", "three"]}, "question 1 has turns"),
        ({"turns": None}, "question 1 has turns"),
        ({"turns": "ab"}, "question 1 has turns"),
        ({"turns": ["one", 2]}, "question 1 has turns"),
        ({"category": None}, "question 1 has category=None"),
        ({"question_id": "1"}, "question_id='1'"),
    ],
)
def test_a_wrong_question_is_named(write, changes, message):
    with pytest.raises(ValueError, match=message):
        load_questions(write(QUESTION | changes))


def test_a_file_that_is_missing_damaged_empty_or_has_an_id_twice_is_said(write, tmp_path):
    with pytest.raises(ValueError, match="question_id=1"):
        load_questions(write(QUESTION, QUESTION))
    with pytest.raises(ValueError, match="holds no question"):
        load_questions(write())
    with pytest.raises(ValueError, match="other.jsonl does not exist"):
        load_questions(tmp_path / "other.jsonl")
    path = write(QUESTION)
    path.write_text(path.read_text() + '{"question_id": 2, "tur\n')
    with pytest.raises(ValueError, match="line 2"):
        load_questions(path)


def test_references_come_from_the_question_then_from_the_file(write):
    questions = bench.questions(3)
    assert sorted(load_references(questions, None, "questions")) == [1, 3]
    del questions[2]["reference"]
    with pytest.raises(ValueError, match=r"questions \[3\] have no reference"):
        load_references(questions, None, "questions")
    path = write({"question_id": 3, "choices": [{"turns": ["x", "y"]}]})
    found = load_references(questions, path, "questions")
    assert [found[n]["choices"][0]["turns"] for n in (1, 3)] == [["reference 1 one", "reference 1 two"], ["x", "y"]]
    with pytest.raises(ValueError, match=r"no reference answer to questions \[1\]"):
        load_references(questions, path, "file")
    with pytest.raises(ValueError, match="reference_source='both'; allowed: questions, file"):
        load_references(questions, path, "both")


@pytest.mark.parametrize("reference", [None, [], ["a"], ["", "b"], "ab", ["a", 1]])
def test_a_reference_that_is_none_is_named(reference):
    questions = bench.questions(1)
    questions[0]["reference"] = reference
    with pytest.raises(ValueError, match="question 1 has reference"):
        load_references(questions, None, "questions")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("single-v1", {"name": "other"}, "has no prompt 'single-v1'"),
        ("single-v1", {"type": "pairwise"}, "'single-v1' is of type"),
        ("single-math-v1", {"output_format": "[[A]]"}, "'single-math-v1' is of type"),
        ("single-v1", {"system_prompt": None}, "'single-v1' needs the texts"),
        ("single-v1", {"prompt_template": "{question} { {answer}"}, "'single-v1' has a prompt_template"),
        ("single-v1", {"prompt_template": "{question}"}, r"has the fields \['question'\]"),
        ("single-v1-multi-turn", {"prompt_template": "{question} {answer}"}, "has the fields"),
    ],
)
def test_a_wrong_judge_prompt_is_named(write, name, changes, message):
    prompts = bench.prompts()
    assert load_judge_prompts(write(*prompts.values())) == prompts
    prompts[name] |= changes
    with pytest.raises(ValueError, match=message):
        load_judge_prompts(write(*prompts.values()))


def test_the_last_answer_of_a_question_counts(write):
    old, new = ({"question_id": 1, "choices": [{"turns": [text, text]}]} for text in ("old", "new"))
    assert load_answers(write(old, new)) == {1: new}
    for wrong in ({"question_id": 1}, {"question_id": 1, "choices": []}, {"choices": [{"turns": ["a", "b"]}]}):
        with pytest.raises(ValueError, match="has not two texts as choices"):
            load_answers(write(old, wrong))


def test_temperature_follows_the_category_and_a_required_one_wins():
    assert temperature({"question_id": 1, "category": "roleplay"}) == 0.7
    assert temperature({"question_id": 1, "category": "no such category"}) == 0.7
    assert temperature({"question_id": 1, "category": "roleplay", "required_temperature": 0}) == 0.0
    with pytest.raises(ValueError, match="question 1: required_temperature='hot'"):
        temperature({"question_id": 1, "category": "roleplay", "required_temperature": "hot"})
