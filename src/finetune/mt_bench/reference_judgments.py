"""Judgments that another judge has published, as a reference: its ratings, and the answers that stand in its prompts.

An answer is taken out of a prompt by filling FastChat's template with the question and the reference answers around it.
A prompt that does not fit is of other questions, references or templates, and is refused: so what a judge is asked
afterwards is, letter by letter, what the published one was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.mt_bench.journal import read_items
from finetune.mt_bench.scores import TURNS, Item, Line, item_scores

_PLACE = "\0"  # of an answer in a filled template


@dataclass(frozen=True)
class Reference:
    """Judgments of both turns of every question, of each of several models.

    Attributes:
        judge: Name of the judge.
        scores: Model -> item -> rating, of the items that have one; models by name.
        answers: Model -> question id -> answer in FastChat's format.
    """

    judge: str
    scores: Mapping[str, Mapping[Item, float]]
    answers: Mapping[str, Mapping[int, Mapping[str, Any]]]


def read_reference(
    path: str | Path,
    questions: Sequence[Mapping[str, Any]],
    references: Mapping[int, Mapping[str, Any]],
    prompts: Mapping[str, Mapping[str, Any]],
    models: Sequence[str] | None = None,
) -> Reference:
    """Read a file of FastChat's `gen_judgment.py --mode single`.

    Args:
        path: JSONL with `question_id`, `model`, `judge` (name, prompt), `user_prompt`, `turn`, `score`.
        questions, references, prompts: That the judge was asked with, as `finetune.mt_bench.judging.Bench` has them.
        models: Whose answers are taken; `None` takes all.

    Raises:
        ValueError: If the file is missing or damaged, of several judges, or lacks a model or judgment; or a prompt is
            of other questions, references or templates; the message names the judgment.
    """
    found, judge = _by_item(Path(path))
    if absent := [model for model in models or () if model not in found]:
        raise ValueError(f"{path} has no model {absent[0]!r}; it has: {', '.join(sorted(found))}.")
    answers: dict[str, dict[int, Mapping[str, Any]]] = {}
    scores: dict[str, dict[Item, float]] = {}
    for model in sorted(models or found):
        answers[model], used = {}, []
        for question in questions:
            number, turns = question["question_id"], []
            for turn in TURNS:
                where = f"{path}: model {model}, question {number}, turn {turn}"
                if (line := found[model].get((number, turn))) is None:
                    raise ValueError(f"{where} was not judged; take a file of all questions.")
                turns.append(_answer(line, question, turns, references, prompts, where))
                used.append(line)
            choices = [{"index": 0, "turns": turns}]
            answers[model][number] = {"question_id": number, "model_id": model, "choices": choices}
        scores[model] = item_scores(used)
    return Reference(judge, scores, answers)


def _by_item(path: Path) -> tuple[dict[str, dict[Item, Line]], str]:
    """Model -> item -> judgment, and the one judge of all of them."""
    found: dict[str, dict[Item, Line]] = {}
    judges = set()
    for number, line in enumerate(read_items(path), 1):
        if lacking := [name for name in ("question_id", "model", "judge", "user_prompt", "turn") if name not in line]:
            raise ValueError(f"{path}, judgment {number} lacks {', '.join(lacking)}: it is none of FastChat's.")
        found.setdefault(line["model"], {})[line["question_id"], line["turn"]] = line
        judges.add(line["judge"][0])
    if len(judges) != 1:
        raise ValueError(f"{path} has judgments by {', '.join(sorted(judges)) or 'nobody'}; allowed: by one judge.")
    return found, judges.pop()


def _answer(
    line: Mapping[str, Any],
    question: Mapping[str, Any],
    before: Sequence[str],
    references: Mapping[int, Mapping[str, Any]],
    prompts: Mapping[str, Mapping[str, Any]],
    where: str,
) -> str:
    """The answer that a prompt ends with; `before`: the answers of the turns before it."""
    name = line["judge"][1]
    if name not in prompts:
        raise ValueError(f"{where}: prompt {name!r}; known are {', '.join(prompts)}.")
    held = references.get(question["question_id"])
    fields = dict(zip(("ref_answer_1", "ref_answer_2"), held["choices"][0]["turns"] if held else (), strict=False))
    first, second = question["turns"]
    fields |= {"question": first, "question_1": first, "question_2": second}
    fields |= {"answer": _PLACE, "answer_1": before[0] if before else _PLACE, "answer_2": _PLACE}
    start, _, end = prompts[name]["prompt_template"].format(**fields).partition(_PLACE)
    prompt = line["user_prompt"]
    if not (prompt.startswith(start) and prompt.endswith(end) and len(prompt) >= len(start) + len(end)):
        raise ValueError(
            f"{where}: the prompt is not FastChat's {name} of this question and its reference; take the questions, "
            "references and prompts that the file was judged with."
        )
    return prompt[len(start) : len(prompt) - len(end)]


def choose(questions: Sequence[Mapping[str, Any]], part: int | None, seed: int) -> list[Mapping[str, Any]]:
    """A part of the questions in their order, stratified by category; a larger part of one seed holds the smaller.

    Every round takes a question of each category, categories and questions shuffled.

    Args:
        part: How many; `None` takes all.
        seed: Of the local generator.

    Raises:
        ValueError: If there are not so many.
    """
    if part is None:
        return list(questions)
    if part > len(questions):
        raise ValueError(f"part={part} questions; there are {len(questions)}, and null takes all.")
    generator = np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for number in generator.permutation(len(questions)):
        groups.setdefault(questions[number]["category"], []).append(int(number))
    rounds = [group[place] for place in range(len(questions)) for group in groups.values() if place < len(group)]
    return [questions[number] for number in sorted(rounds[:part])]
