"""MT-Bench's questions, reference answers, judge prompts and model answers, read as by FastChat's loaders and checked.

Source: Zheng et al., 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena"; FastChat, ``llm_judge/common.py``.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from finetune.mt_bench.journal import read_items

Question = dict[str, Any]
Answer = dict[str, Any]

OTHER_TEMPERATURE = 0.7  # of a category that FastChat does not list: gen_model_answer.py
REFERENCE_SOURCES = ("questions", "file")
# The fields that FastChat's run_judge_single fills in, by prompt.
PROMPT_FIELDS = {
    "single-v1": {"question", "answer"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-v1-multi-turn": {"question_1", "answer_1", "question_2", "answer_2"},
    "single-math-v1-multi-turn": {"question_1", "answer_1", "question_2", "answer_2", "ref_answer_1", "ref_answer_2"},
}


def load_questions(path: str | Path) -> list[Question]:
    """Questions with two turns each: ``{"question_id", "category", "turns": [first, second], ...}``.

    Raises:
        ValueError: if the file is missing or damaged, an id occurs twice, or a question has no category or not exactly
            two turns of text; the message names the question.
    """
    questions = read_items(path)  # as FastChat's loader, whose package imports torch
    if not questions:
        raise ValueError(f"{path} holds no question.")
    seen = set()
    for question in questions:
        number = question.get("question_id")
        if not isinstance(number, int) or number in seen:
            raise ValueError(f"{path}: question_id={number!r}; each question needs a whole number of its own.")
        seen.add(number)
        if not isinstance(question.get("category"), str) or not question["category"]:
            raise ValueError(f"{path}: question {number} has category={question.get('category')!r}; it must be a text.")
        turns = question.get("turns")
        if not _texts(turns) or len(turns) != 2 or not all(turn.strip() for turn in turns):
            raise ValueError(f"{path}: question {number} has turns={turns!r}; it must have exactly two texts.")
    return questions


def load_references(questions: Sequence[Question], path: str | Path | None, source: str) -> dict[int, Answer]:
    """Reference answers in FastChat's format, ``{"choices": [{"turns": [first, second]}]}``, by question id.

    Only questions of FastChat's ``NEED_REF_CATS`` (math, reasoning, coding) have one.

    Args:
        questions: from :func:`load_questions`.
        path: FastChat's file, such as ``reference_answer/gpt-4.jsonl``.
        source: ``questions``: the questions' own field ``reference`` (FastChat's code ignores it, and its file still
            holds the answers that Inflection corrected), the file for those without one; ``file``: the file alone.
            The field's second text may be empty, as in the published files where no answer is set.

    Raises:
        ValueError: on an unknown source, a damaged file, or a question without a reference.
    """
    from fastchat.llm_judge.common import NEED_REF_CATS

    if source not in REFERENCE_SOURCES:
        raise ValueError(f"reference_source={source!r}; allowed: {', '.join(REFERENCE_SOURCES)}.")
    needed = {question["question_id"]: question for question in questions if question["category"] in NEED_REF_CATS}
    own = source == "questions"
    references = {n: _own_reference(asked) for n, asked in needed.items() if own and "reference" in asked}
    missing = [number for number in needed if number not in references]
    if not missing:
        return references
    if path is None:
        raise ValueError(f"questions {missing} have no reference answer, and no file of references is given.")
    held = load_answers(path)
    if absent := [number for number in missing if number not in held]:
        raise ValueError(f"{path} holds no reference answer to questions {absent}; each of {NEED_REF_CATS} needs one.")
    return references | {number: held[number] for number in missing}


def load_judge_prompts(path: str | Path) -> dict[str, dict[str, Any]]:
    """Judge prompts by name; the four for the grading of a single answer must be there.

    Raises:
        ValueError: if the file is missing or damaged, or one of the four is missing or is not of FastChat's form.
    """
    prompts = {str(prompt.get("name")): prompt for prompt in read_items(path)}
    for name, fields in PROMPT_FIELDS.items():
        if name not in prompts:
            raise ValueError(f"{path} has no prompt {name!r}; it holds {', '.join(prompts) or 'nothing'}.")
        if wrong := _wrong_in_prompt(prompts[name], fields):
            raise ValueError(f"{path}: prompt {name!r} {wrong}.")
    return prompts


def load_answers(path: str | Path) -> dict[int, Answer]:
    """Answers in FastChat's format by question id; the last line of a question wins, as in FastChat's own loader.

    Raises:
        ValueError: if the file is missing or damaged, or a line has no question id or no two turns of text.
    """
    answers = {}
    for answer in read_items(path):
        number = answer.get("question_id")
        if not isinstance(number, int) or turns_of(answer) is None:
            raise ValueError(
                f"{path}: the answer to question {number!r} has not two texts as choices[0].turns: run the stage that "
                "writes it again."
            )
        answers[number] = answer
    return answers


def turns_of(answer: Mapping[str, Any]) -> list[str] | None:
    """The two texts of an answer in FastChat's format; None if it has not two texts."""
    try:
        turns = answer["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        return None
    return turns if _texts(turns) and len(turns) == 2 else None


def answer_sha256(turns: Sequence[str]) -> str:
    """Of the answers that a judge's prompt holds: the first, or both."""
    return hashlib.sha256(json.dumps(list(turns)).encode()).hexdigest()


def temperature(question: Mapping[str, Any]) -> float:
    """Sampling temperature of the answers to a question, as in FastChat's ``gen_model_answer``."""
    from fastchat.llm_judge.common import temperature_config

    found = question.get("required_temperature", temperature_config.get(question["category"], OTHER_TEMPERATURE))
    if not isinstance(found, (int, float)) or isinstance(found, bool) or found < 0:
        raise ValueError(f"question {question['question_id']}: required_temperature={found!r}; it must be 0 or more.")
    return float(found)


def _wrong_in_prompt(prompt: Mapping[str, Any], fields: set[str]) -> str | None:
    form = (prompt.get("type"), prompt.get("output_format"))
    if form != ("single", "[[rating]]"):
        return f"is of type and output_format {form}; they must be single and [[rating]]"
    if not _texts([prompt.get("system_prompt"), prompt.get("prompt_template")]):
        return "needs the texts system_prompt and prompt_template"
    try:
        found = {field for _, field, _, _ in string.Formatter().parse(prompt["prompt_template"]) if field is not None}
    except ValueError as error:
        return f"has a prompt_template that is none ({error})"
    return None if found == fields else f"has the fields {sorted(found)}; FastChat fills in {sorted(fields)}"


def _own_reference(question: Mapping[str, Any]) -> Answer:
    turns = question["reference"]
    if not _texts(turns) or len(turns) != 2 or not turns[0].strip():
        raise ValueError(
            f"question {question['question_id']} has reference={turns!r}; it must be two texts, the first not empty."
        )
    return {"question_id": question["question_id"], "choices": [{"index": 0, "turns": list(turns)}]}


def _texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
