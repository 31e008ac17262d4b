"""Appendix E as one page: a question, all methods' answers side by side, their scores and the judge's words.

The page is one file without any external resource; every text of a model, a judge or a question is escaped. Only the
first turn of a question is shown, as in the paper.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.mt_bench.journal import read_items
from finetune.mt_bench.judged import Judged, current_records
from finetune.report.labels import Labels
from finetune.report.page.render import render
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.store import records

TURN = 1
PAPER_MODEL = "llama2_7b"

_CUT = {
    "cut": "The prompt was longer than the model's window and was cut.",
    "refused": "The prompt was longer than the model's window and was refused.",
}


@dataclass(frozen=True)
class Answers:
    """The answers of one fine-tuned model.

    Attributes:
        record: The record: `run`, `template`, `options`, `model`.
        lines: Question id -> FastChat's answer line, with `cut` and `refused` a turn.
    """

    record: Mapping[str, Any]
    lines: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """What the page shows of one decoder.

    Attributes:
        model: Its name; `None`: none ran.
        stands_in: Whether it stands in LLaMa-2-7B's place.
        questions: FastChat's question lines to show, in order.
        methods: Method -> its label, in the order of the page.
        answers: Method -> answers of one seed, where there are any.
        judged: Method -> judgments of the same seed's answers, where there are any.
    """

    model: str | None
    stands_in: bool
    questions: Sequence[Mapping[str, Any]]
    methods: Mapping[str, str]
    answers: Mapping[str, Answers]
    judged: Mapping[str, Judged]


@dataclass(frozen=True)
class Card:
    """One method's answer to one question.

    Attributes:
        label: Of the method.
        answer: `None`: there is none, for the reason `why`.
        why: Says so.
        score: Median of the scores, `None` if it was not judged.
        scores: All of them.
        repeats: Judgments that there should be.
        warnings: What is wrong with the answer or its judgments.
        words: (repeat, score, the judge's words).
    """

    label: str
    answer: str | None
    why: str = ""
    score: float | None = None
    scores: tuple[float, ...] = ()
    repeats: int = 0
    warnings: tuple[str, ...] = ()
    words: tuple[tuple[int, float, str], ...] = ()


def read_answers(folder: str | Path) -> Iterator[Answers]:
    """Read the answers below a folder that belong to a record `<model_id>.json` whose `run.kind` is `answers`.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    for path in current_records(folder):
        record = records.read_json(path)
        if record.get("run", {}).get("kind") == "answers":
            digest = record["run"]["config_hash"]
            lines = read_items(path.with_suffix(".jsonl"))
            yield Answers(record, {one["question_id"]: one for one in lines if one.get("config_hash") == digest})


def choose_parts(
    experiment: Mapping[str, Any],
    labels: Labels,
    *,
    questions: Iterable[Mapping[str, Any]],
    examples: Sequence[int],
    answers: Iterable[Answers],
    judgments: Iterable[Judged],
) -> list[Part]:
    """Choose what the page shows: of each method the lowest seed that all methods with answers have, or its lowest.

    The decoder in LLaMa-2-7B's place comes first, then all others with answers.

    Args:
        experiment: The experiment's file: `name`, `stands_for`, `methods`; answers and judgments of other experiments
            are passed over. A method that it does not list is shown where it has answers.
        labels: Of methods.
        questions: All question lines of the set.
        examples: Ids of the questions to show.
        answers: What `read_answers` found.
        judgments: What `finetune.mt_bench.judged.read_judgments` found.

    Raises:
        ValueError: If no example is named, or one is not among the questions.
    """
    by_id = {question["question_id"]: question for question in questions}
    if not examples or not set(examples) <= set(by_id):
        raise ValueError(f"examples={[*examples]}; name at least one question, each of them of {sorted(by_id)}")
    found, judged = (_by_model(of, experiment["name"]) for of in (answers, judgments))
    first = experiment["stands_for"].get(PAPER_MODEL)
    models = dict.fromkeys([first, *found] if first or not found else found)
    shown = [by_id[number] for number in examples]
    known = {name: labels.method(name) for name in experiment.get("methods", ())}
    return [
        _part(model, model == first, shown, known, labels, found.get(model, {}), judged.get(model, {}))
        for model in models
    ]


def _part(
    model: str | None,
    stands_in: bool,
    questions: Sequence[Mapping[str, Any]],
    methods: Mapping[str, str],
    labels: Labels,
    found: Mapping[str, Mapping[int, Answers]],
    judged: Mapping[str, Mapping[int, Judged]],
) -> Part:
    common = set.intersection(*map(set, found.values())) if found else set()
    seeds = {method: min(common or of) for method, of in found.items()}
    return Part(
        model=model,
        stands_in=stands_in,
        questions=questions,
        methods=methods | {name: labels.method(name) for name in found},
        answers={method: found[method][seed] for method, seed in seeds.items()},
        judged={method: judged[method][seed] for method, seed in seeds.items() if seed in judged.get(method, {})},
    )


def to_html(experiment: str, parts: Sequence[Part]) -> str:
    """Render the page of an experiment."""
    return render("examples.html.j2", experiment=experiment, parts=[part_context(part) for part in parts])


def part_context(page: Part) -> dict[str, Any]:
    """All that the template shows of a decoder, as data."""
    return {
        "model": page.model or "none",
        "facts": _facts(page),
        "quality": all(one.record["judge"]["measures_quality"] for one in page.judged.values()),
        "questions": [
            {
                "id": question["question_id"],
                "category": question["category"],
                "text": question["turns"][TURN - 1],
                "cards": [_card(page, method, question["question_id"]) for method in page.methods],
            }
            for question in page.questions
        ],
    }


def _by_model(found: Iterable[Any], experiment: str) -> dict[str, dict[str, dict[int, Any]]]:
    """Model -> method -> seed -> what was found."""
    by_model: dict[str, dict[str, dict[int, Any]]] = {}
    for one in found:
        run = one.record["run"]
        if run["experiment"] == experiment:
            by_model.setdefault(run["model"], {}).setdefault(run["method"], {})[run["seed"]] = one
    return by_model


def _facts(page: Part) -> list[str]:
    """Say whose answers these are, and who judged them."""
    paper = f"{PAPER_MODELS[PAPER_MODEL]} ({PAPER_MODEL})"
    if not page.model:
        return [f"Nothing ran in the place of {paper}."]
    titles = [title for one in page.answers.values() if (title := one.record.get("model", {}).get("title"))]
    name = f"{titles[0]} ({page.model})" if titles else page.model
    own = page.model == PAPER_MODEL
    place = f"stands in the place of {paper}" if page.stands_in else "is a decoder that the paper has not"
    facts = [f"{paper} is the paper's own model." if own else f"{name} {place}."]
    if page.answers:
        seeds = [f"{page.methods[method]} {one.record['run']['seed']}" for method, one in page.answers.items()]
        templates = sorted({str(one.record.get("template")) for one in page.answers.values()})
        facts += [f"Seeds shown: {', '.join(seeds)}.", f"Conversation template: {', '.join(templates)}."]
    lines = [line for one in page.answers.values() for line in one.lines.values()]
    cut, refused = (sum(sum(map(bool, line.get(name, ()))) for line in lines) for name in _CUT)
    facts.append(f"Prompts longer than the model's window in all its answers: {cut} cut, {refused} refused.")
    judges = dict.fromkeys(
        f"{judge['model']}, median of {judge['repeats']} repeats"
        for judge in (one.record["judge"] for one in page.judged.values())
    )
    return [*facts, f"Judge: {'; '.join(judges)}." if judges else "Nothing was judged."]


def _card(page: Part, method: str, number: int) -> Card:
    """One method's answer, its score, and the judge's words on it."""
    label, answers, judged = page.methods[method], page.answers.get(method), page.judged.get(method)
    if answers is None or number not in answers.lines:
        why = "no answers of this method" if answers is None else "this question was not answered"
        return Card(label, None, why)
    line = answers.lines[number]
    text = line["choices"][0]["turns"][TURN - 1]
    mine = [one for one in (judged.lines if judged else ()) if (one["question_id"], one["turn"]) == (number, TURN)]
    # As `finetune.mt_bench.judging` names the answers that a prompt for the first turn held.
    digest = hashlib.sha256(json.dumps([text]).encode()).hexdigest()
    found = [one for one in mine if one.get("answer_sha256") == digest]
    scores = tuple(one["score"] for one in found)
    other = "Judgments of another answer than this one are not shown: run the judgments stage again."
    return Card(
        label,
        text,
        score=statistics.median(scores) if scores else None,
        scores=scores,
        repeats=judged.record["judge"]["repeats"] if judged else 0,
        warnings=(
            *([other] if len(found) < len(mine) else []),
            *(words for name, words in _CUT.items() if any(line.get(name, ())[TURN - 1 : TURN])),
        ),
        words=tuple((one.get("repeat", 0) + 1, one["score"], str(one.get("judgment", ""))) for one in found),
    )
