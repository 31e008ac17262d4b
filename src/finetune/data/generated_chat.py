"""Dialogues, questions and judge prompts of the smoke experiment, from a grammar: for runs without a network.

Everybody asks about one sentence ("name the subject: the old dogs help a cat today"), and asks again about the same
sentence ("now name the time"). Formats are those of the real files: OpenAssistant's message table, FastChat's
questions, judge prompts and reference answers. Scores on them say nothing about language.

The plain text for pretraining hardly ever has two of the requests (``speak``, ``code``) and no wrong reply, so that
fine-tuning has something to teach. No sentence is in two files.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from finetune.data.generated import TIMES, subject_verb_object
from finetune.data.tables import write_parquet
from finetune.store.files import write_atomically, write_text

TAUGHT_LATER = ("speak", "code")
SEEN_BEFORE = 0.05  # share of the dialogues for pretraining that have one of them: their words are known, barely
# FastChat's categories, with the request of the first and of the second turn.
CATEGORIES = {
    "writing": ("front", "omit"),
    "roleplay": ("speak", "repeat"),
    "reasoning": ("object", "subject"),
    "math": ("count", "count_rest"),
    "coding": ("code", "verb"),
    "extraction": ("subject", "object"),
    "stem": ("time", "front"),
    "humanities": ("repeat", "time"),
}
NEED_REFERENCES = ("math", "reasoning", "coding")  # FastChat's NEED_REF_CATS
FIRST_QUESTION = 81  # as MT-Bench
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLUMNS = {
    "message_id": pa.string(), "parent_id": pa.string(), "text": pa.string(), "role": pa.string(),
    "lang": pa.string(), "review_count": pa.int64(), "review_result": pa.bool_(), "deleted": pa.bool_(),
    "rank": pa.int64(), "synthetic": pa.bool_(), "model_name": pa.string(), "message_tree_id": pa.string(),
    "tree_state": pa.string(),
}  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """A sentence and its parts: "the old dogs", "help", "a cat", "today"."""

    subject: str
    verb: str
    object: str
    time: str

    @property
    def clause(self) -> str:
        """The sentence without its time."""
        return f"{self.subject} {self.verb} {self.object}"

    def __str__(self) -> str:
        return f"{self.clause} {self.time}"


# name -> what is asked and what is answered; roles are drawn by `ask`.
REQUESTS: Mapping[str, tuple[str, Callable[[Sentence], str]]] = {
    "repeat": ("repeat it", str),
    "front": ("put the time in front", lambda s: f"{s.time} {s.clause}"),
    "omit": ("leave the time out", lambda s: s.clause),
    "subject": ("name the subject", lambda s: s.subject),
    "verb": ("name the verb", lambda s: s.verb),
    "object": ("name the object", lambda s: s.object),
    "time": ("name the time", lambda s: s.time),
    "count": ("count the words", lambda s: NUMBERS[len(str(s).split())]),
    "count_rest": ("count the words without the time", lambda s: NUMBERS[len(s.clause.split())]),
    "speak": ("speak as the king", lambda s: f"i the king say {s}"),
    "code": ("write it as code", lambda s: f"{s.verb}({s.subject.split()[-1]}, {s.object.split()[-1]})"),
}


def write_chat(folder: str | Path, *, trees: int, dialogues: int, seed: int) -> None:
    """Write the files below a folder; each is there whole or not at all.

    - ``oasst1/messages.parquet``: message trees in OpenAssistant's columns;
    - ``mt_bench/question.jsonl``, ``judge_prompts.jsonl`` and ``reference_answer/gpt-4.jsonl``: two questions a
      category. One that needs a reference has none of its own, as question 123 of MT-Bench Inf;
    - ``text/dialogues.txt``: dialogues for pretraining, one a line, their turns separated by tabs.

    Raises:
        ValueError: if there are more trees and dialogues than sentences.
    """
    folder, draw = Path(folder), _distinct_sentences(random.Random(f"sentences {seed}"))
    if trees < 1 or dialogues < 1 or trees + dialogues > 200_000:
        raise ValueError(f"trees={trees}, dialogues={dialogues}; needed: at least 1 each, at most 200000 together.")
    questions = _questions(draw)
    references = [_reference(question) for question in questions if question["category"] in NEED_REFERENCES]
    del next(question for question in reversed(questions) if "reference" in question)["reference"]
    rng = random.Random(f"trees {seed}")
    messages = [message for _ in range(trees) for message in _tree(rng, draw())]
    write_parquet(folder / "oasst1" / "messages.parquet", pa.Table.from_pylist(messages, pa.schema(COLUMNS.items())))
    _write_lines(folder / "mt_bench" / "question.jsonl", questions)
    _write_lines(folder / "mt_bench" / "judge_prompts.jsonl", JUDGE_PROMPTS)
    _write_lines(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl", references)
    rng = random.Random(f"dialogues {seed}")
    lines = ["\t".join(_dialogue(rng, draw())) for _ in range(dialogues)]
    write_text(folder / "text" / "dialogues.txt", "\n".join(lines) + "\n")


def ask(request: str, sentence: Sentence, first: bool) -> str:
    """The user's turn: the sentence is given in the first one."""
    text, _ = REQUESTS[request]
    return f"{text}: {sentence}" if first else f"now {text}"


def answer(request: str, sentence: Sentence) -> str:
    """The right answer."""
    return REQUESTS[request][1](sentence)


def _distinct_sentences(rng: random.Random) -> Callable[[], Sentence]:
    seen: set[Sentence] = set()

    def draw() -> Sentence:
        while True:
            sentence = Sentence(*subject_verb_object(rng), rng.choice(TIMES))
            if sentence not in seen:
                seen.add(sentence)
                return sentence

    return draw


def _dialogue(rng: random.Random, sentence: Sentence) -> list[str]:
    """One to three exchanges about a sentence."""
    known = [request for request in REQUESTS if request not in TAUGHT_LATER]
    requests = rng.sample(known, rng.randint(1, 3))
    if rng.random() < SEEN_BEFORE:
        requests[rng.randrange(len(requests))] = rng.choice(TAUGHT_LATER)
    turns = []
    for place, request in enumerate(requests):
        turns += [ask(request, sentence, place == 0), answer(request, sentence)]
    return turns


def _tree(rng: random.Random, sentence: Sentence) -> list[dict[str, Any]]:
    """Messages of a tree, parents first: replies are ranked, the best is asked on; some questions stay unanswered."""
    requests = rng.sample(list(REQUESTS), 4)
    messages: list[dict[str, Any]] = []

    def add(parent: str | None, text: str, role: str, rank: int | None = None) -> str:
        name = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        tree = messages[0]["message_tree_id"] if messages else name
        messages.append(
            {
                "message_id": name, "parent_id": parent, "text": text, "role": role, "lang": "en", "review_count": 3,
                "review_result": True, "deleted": False, "rank": rank, "synthetic": True, "model_name": "grammar",
                "message_tree_id": tree, "tree_state": "ready_for_export",
            }
        )  # fmt: skip
        return name

    parent = None
    for place in range(rng.choice((2, 2, 3, 4))):
        asked = add(parent, ask(requests[place], sentence, place == 0), "prompter")
        if place and rng.random() < 0.1:
            break  # nobody answered
        right = answer(requests[place], sentence)
        worse = [_worse(rng, right)] if rng.random() < 0.2 else []
        for rank, reply in enumerate([right, *worse]):
            name = add(asked, reply, "assistant", rank if worse else None)  # a lone reply has no rank
            parent = name if rank == 0 else parent
    return messages


def _worse(rng: random.Random, right: str) -> str:
    """A reply with a fault: a word left out, or none known."""
    words = right.split()
    if len(words) == 1:
        return "i do not know"
    del words[rng.randrange(len(words))]
    return " ".join(words)


def _questions(draw: Callable[[], Sentence]) -> list[dict[str, Any]]:
    questions = []
    for category, requests in CATEGORIES.items():
        for _ in range(2):
            sentence = draw()
            asked = [ask(request, sentence, place == 0) for place, request in enumerate(requests)]
            question = {"question_id": FIRST_QUESTION + len(questions), "category": category, "turns": asked}
            if category in NEED_REFERENCES:
                question["reference"] = [answer(request, sentence) for request in requests]
            questions.append(question)
    return questions


def _reference(question: Mapping[str, Any]) -> dict[str, Any]:
    """A line of FastChat's reference file; it is named after a judge, the answers are the grammar's."""
    number, choices = question["question_id"], [{"index": 0, "turns": question["reference"]}]
    named = {"question_id": number, "answer_id": f"grammar-{number}", "model_id": "grammar"}
    return named | {"choices": choices, "tstamp": 0}


def _write_lines(path: Path, items: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(item) + "\n" for item in items))


_TASK = (
    "Below are a request about a short sentence and the reply of a language model. Judge whether the reply does what "
    "was asked{with_reference}, and nothing else.{turn} First write one or two sentences of reasons. Then give a whole "
    'number from 1 (useless) to 10 (perfect), written exactly like this: "[[rating]]". A reply of middling quality, '
    'say, gets "Rating: [[5]]".'
)
_COMPARED = ", compared with the reference answer"
_SECOND_TURN = " Only the reply to the second request counts."
_CONVERSATION = (
    "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{question_1}\n\n### Assistant A:\n{answer_1}"
    "\n\n### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n<|The End of Assistant A's Conversation with User|>"
)
_REFERENCES = (
    "<|The Start of Reference Answer|>\n\n### User:\n{question_1}\n\n### Reference answer:\n{ref_answer_1}"
    "\n\n### User:\n{question_2}\n\n### Reference answer:\n{ref_answer_2}\n\n<|The End of Reference Answer|>"
)
_REFERENCE = "[The Start of Reference Answer]\n{ref_answer_1}\n[The End of Reference Answer]"
_ANSWER = "[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"


def _judge_prompt(name: str, category: str, system: str, text: str) -> dict[str, str]:
    return {
        "name": name, "type": "single", "system_prompt": system, "prompt_template": text,
        "description": f"Generated questions, {name}", "category": category, "output_format": "[[rating]]",
    }  # fmt: skip


# Names, placeholders and marks are FastChat's, since its code fills them in; the words are this project's.
JUDGE_PROMPTS = [
    _judge_prompt(
        "single-v1", "general", "You rate short replies.",
        f"{_TASK.format(with_reference='', turn='')}\n\n[Question]\n{{question}}\n\n{_ANSWER}",
    ),
    _judge_prompt(
        "single-math-v1", "math", "You rate short replies.",
        f"{_TASK.format(with_reference=_COMPARED, turn='')}\n\n[Question]\n{{question}}\n\n{_REFERENCE}\n\n{_ANSWER}",
    ),
    _judge_prompt(
        "single-v1-multi-turn", "general", _TASK.format(with_reference="", turn=_SECOND_TURN), _CONVERSATION,
    ),
    _judge_prompt(
        "single-math-v1-multi-turn", "math", _TASK.format(with_reference=_COMPARED, turn=_SECOND_TURN),
        f"{_REFERENCES}\n\n\n{_CONVERSATION}",
    ),
]  # fmt: skip
