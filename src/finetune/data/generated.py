"""Small tasks in GLUE's format and plain text, from a grammar: for runs without a network.

Labels hang on word *order* and on agreement between words, never on which words there are: the words of a row are drawn
first, then its label. So a bag of words can't tell them, and a model that reads order can.

- ``cola``: acceptable or not. Unacceptable sentences have two neighbouring words exchanged, or a verb that disagrees
  with its subject.
- ``mrpc``: same or different. Two sentences of different words are the same when both have their time adverb in front,
  or both at the end.
- ``stsb``: 0 to 5, by how far apart the time adverbs of the two sentences stand.

A share of the labels is wrong on purpose, so that no method reaches 100 %. The scores say nothing about language.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from finetune.data.tables import write_parquet
from finetune.store.files import write_text

NOUNS = ("dog", "cat", "boy", "girl", "teacher", "doctor", "farmer", "king", "painter", "singer", "driver", "sailor")
VERBS = ("help", "visit", "call", "greet", "admire", "trust", "warn", "thank")
ADJECTIVES = ("old", "young", "tall", "small", "happy", "angry")
TIMES = ("yesterday", "today", "again", "now")
LABEL_NOISE = 0.08


def write_corpus(path: str | Path, sentences: int, seed: int) -> None:
    """Write sentences of the grammar, one a line, for masked-language-model pretraining."""
    rng = random.Random(seed)
    lines = [" ".join(_with_time(_clause(rng), rng, rng.randrange(2))) for _ in range(sentences)]
    write_text(path, "\n".join(lines) + "\n")


def write_task(task: str, folder: str | Path, train: int, validation: int, seed: int) -> None:
    """Write ``<folder>/<task>/{train,validation}-00000-of-00001.parquet`` with GLUE's columns and types.

    Args:
        task: ``cola``, ``mrpc`` or ``stsb``.
        train, validation: rows; no text is in both.
        seed: of everything.

    Raises:
        ValueError: on another task.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}; the grammar has: {', '.join(TASKS)}.")
    rng, seen, rows = random.Random(f"{task} {seed}"), set(), []
    while len(rows) < train + validation:
        row = TASKS[task](rng)
        key = tuple(value for name, value in row.items() if name != "label")
        if key not in seen:
            seen.add(key)
            rows.append(row)
    for split, part in (("train", rows[:train]), ("validation", rows[train:])):
        columns: dict[str, Any] = {name: pa.array([row[name] for row in part]) for name in part[0] if name != "label"}
        kind = pa.float32() if task == "stsb" else pa.int64()
        columns["label"] = pa.array([row["label"] for row in part], type=kind)
        columns["idx"] = pa.array(range(len(part)), type=pa.int32())
        write_parquet(Path(folder) / task / f"{split}-00000-of-00001.parquet", pa.table(columns))


def _clause(rng: random.Random) -> list[str]:
    """Subject, verb, object; the verb agrees with the subject: "the old dogs help a cat"."""
    return " ".join(subject_verb_object(rng)).split()


def subject_verb_object(rng: random.Random) -> tuple[str, str, str]:
    """The parts of a clause: "the old dogs", "help", "a cat"."""
    subject, plural = _noun_phrase(rng)
    verb = rng.choice(VERBS)
    return subject, verb if plural else f"{verb}s", _noun_phrase(rng)[0]


def _noun_phrase(rng: random.Random) -> tuple[str, bool]:
    plural = rng.random() < 0.5
    noun = rng.choice(NOUNS)
    adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.4 else []
    return " ".join(["the" if plural else "a", *adjective, f"{noun}s" if plural else noun]), plural


def _with_time(clause: list[str], rng: random.Random, place: int) -> list[str]:
    """The clause with a time adverb in front (0) or at the end (1)."""
    time = rng.choice(TIMES)
    return [time, *clause] if place == 0 else [*clause, time]


def _noisy(label: int, rng: random.Random) -> int:
    return 1 - label if rng.random() < LABEL_NOISE else label


def _cola(rng: random.Random) -> dict[str, Any]:
    words, label = _clause(rng), rng.randrange(2)
    if label == 0:
        if rng.random() < 0.5:
            at = rng.randrange(len(words) - 1)
            words[at], words[at + 1] = words[at + 1], words[at]
        else:
            at = next(i for i, word in enumerate(words) if word.removesuffix("s") in VERBS)
            words[at] = words[at].removesuffix("s") if words[at].endswith("s") else f"{words[at]}s"
    return {"sentence": " ".join(words), "label": _noisy(label, rng)}


def _mrpc(rng: random.Random) -> dict[str, Any]:
    places = rng.randrange(2), rng.randrange(2)
    first, second = (" ".join(_with_time(_clause(rng), rng, place)) for place in places)
    return {"sentence1": first, "sentence2": second, "label": _noisy(int(places[0] == places[1]), rng)}


def _stsb(rng: random.Random) -> dict[str, Any]:
    places, texts = [], []
    for _ in range(2):
        clause = _clause(rng)
        at = rng.randrange(len(clause) + 1)
        places.append(at / len(clause))
        texts.append(" ".join([*clause[:at], rng.choice(TIMES), *clause[at:]]))
    label = 5 * (1 - abs(places[0] - places[1])) + rng.gauss(0, 0.4)
    return {"sentence1": texts[0], "sentence2": texts[1], "label": min(5.0, max(0.0, label))}


TASKS: Mapping[str, Callable[[random.Random], dict[str, Any]]] = {"cola": _cola, "mrpc": _mrpc, "stsb": _stsb}
