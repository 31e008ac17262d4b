"""Appendix E as one page: a question, all methods' answers side by side, their scores and the judge's words.

The page is one file without any external resource; every text of a model, a judge or a question is escaped. Only the
first turn of a question is shown, as in the paper.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.mt_bench.judged import Judged, current_records, vouched_answers
from finetune.report.evidence.experiment import Experiment
from finetune.report.page.render import render
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.store import records

TURN = 1
PAPER_MODEL = "llama2_7b"

_CUT = {
    "cut": "The prompt was longer than the model's window and was cut.",
    "refused": "The prompt was longer than the model's window and was refused.",
}


class Answers(NamedTuple):
    """A model's answers: their record, and question id -> FastChat's line, with `cut` and `refused`."""

    record: Mapping[str, Any]
    lines: Mapping[int, Mapping[str, Any]]


class Shown(NamedTuple):
    """One method of a page: its label, and the answers and judgments of one seed, where there are any."""

    label: str
    answers: Answers | None
    judged: Judged | None


class Card(NamedTuple):
    """One method's answer to one question.

    Attributes:
        label: Of the method.
        answer: `None`: there is none, for the reason `why`.
        why: Says so.
        scores: Of all judgments of this answer; the page shows their median.
        repeats: Judgments that there should be.
        warnings: What is wrong with the answer or its judgments.
        words: (repeat, score, the judge's words).
    """

    label: str
    answer: str | None
    why: str = ""
    scores: tuple[float, ...] = ()
    repeats: int = 0
    warnings: tuple[str, ...] = ()
    words: tuple[tuple[int, float, str], ...] = ()

    @property
    def score(self) -> float | None:
        return statistics.median(self.scores) if self.scores else None


def read_answers(folder: str | Path) -> Iterator[Answers]:
    """Read the answers below a folder that belong to a record `<model_id>.json` whose `run.kind` is `answers`.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    for path in current_records(folder):
        if records.read_json(path).get("run", {}).get("kind") == "answers":
            yield Answers(records.read_record(path), vouched_answers(path.with_suffix(".jsonl")))


def parts_of(
    experiment: Experiment,
    *,
    questions: Iterable[Mapping[str, Any]],
    examples: Sequence[int],
    answers: Iterable[Answers],
    judgments: Iterable[Judged],
) -> list[dict[str, Any]]:
    """What the page shows of each decoder, the one in LLaMa-2-7B's place first.

    Of each method the lowest seed is shown that all methods with answers have, or its lowest.

    Args:
        experiment: The experiment; what is of others is passed over. A method that it does not list is shown where it
            has answers.
        questions: All question lines of the set.
        examples: Ids of the questions to show.
        answers: What `read_answers` found.
        judgments: What `finetune.mt_bench.judged.read_judgments` found.

    Returns:
        Dicts with `model`, `facts`, `quality` (whether scores measure any) and `questions` (`id`, `category`, `text`,
        `cards`).

    Raises:
        ValueError: If no example is named, or one is not among the questions.
    """
    by_id = {question["question_id"]: question for question in questions}
    if not examples or not set(examples) <= set(by_id):
        raise ValueError(f"examples={[*examples]}; name at least one question, each of them of {sorted(by_id)}")
    found, judged = (_by_model(of, experiment.name) for of in (answers, judgments))
    first = experiment.stands_for.get(PAPER_MODEL)
    parts = []
    for model in dict.fromkeys([first, *found] if first or not found else found):
        shown = _shown(experiment, found.get(model or "", {}), judged.get(model or "", {}))
        asked = [
            {
                "id": number,
                "category": by_id[number]["category"],
                "text": by_id[number]["turns"][TURN - 1],
                "cards": [_card(one, number) for one in shown],
            }
            for number in examples
        ]
        quality = all(one.judged.record["judge"]["measures_quality"] for one in shown if one.judged)
        facts = _facts(model, model == first, shown)
        parts.append({"model": model or "none", "facts": facts, "quality": quality, "questions": asked})
    return parts


def to_html(experiment: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """Render the page of an experiment."""
    return render("examples.html.j2", experiment=experiment, parts=parts)


def _by_model(found: Iterable[Any], experiment: str) -> dict[str, dict[str, dict[int, Any]]]:
    """Model -> method -> seed -> what was found."""
    by_model: dict[str, dict[str, dict[int, Any]]] = {}
    for one in found:
        run = one.record["run"]
        if run["experiment"] == experiment:
            by_model.setdefault(run["model"], {}).setdefault(run["method"], {})[run["seed"]] = one
    return by_model


def _shown(experiment: Experiment, answers: Mapping[str, Any], judged: Mapping[str, Any]) -> list[Shown]:
    """The methods with the seed that is shown of each."""
    common = set.intersection(*map(set, answers.values())) if answers else set()
    shown = []
    for method in dict.fromkeys((*experiment.methods, *answers)):
        label, by_seed = experiment.labels.method(method), answers.get(method)
        if not by_seed:
            shown.append(Shown(label, None, None))
            continue
        seed = min(common or by_seed)
        shown.append(Shown(label, by_seed[seed], judged.get(method, {}).get(seed)))
    return shown


def _facts(model: str | None, stands_in: bool, shown: Sequence[Shown]) -> list[str]:
    """Say whose answers these are, and who judged them."""
    paper = f"{PAPER_MODELS[PAPER_MODEL]} ({PAPER_MODEL})"
    if not model:
        return [f"Nothing ran in the place of {paper}."]
    there = [(one.label, one.answers) for one in shown if one.answers is not None]
    titles = [title for _, answers in there if (title := answers.record.get("model", {}).get("title"))]
    name = f"{titles[0]} ({model})" if titles else model
    place = f"stands in the place of {paper}" if stands_in else "is a decoder that the paper has not"
    facts = [f"{paper} is the paper's own model." if model == PAPER_MODEL else f"{name} {place}."]
    if there:
        seeds = [f"{label} {answers.record['run']['seed']}" for label, answers in there]
        templates = sorted({str(answers.record.get("template")) for _, answers in there})
        facts += [f"Seeds shown: {', '.join(seeds)}.", f"Conversation template: {', '.join(templates)}."]
    lines = [line for _, answers in there for line in answers.lines.values()]
    cut, refused = (sum(sum(map(bool, line.get(name, ()))) for line in lines) for name in _CUT)
    facts.append(f"Prompts longer than the model's window in all its answers: {cut} cut, {refused} refused.")
    judges = [one.judged.record["judge"] for one in shown if one.judged is not None]
    names = dict.fromkeys(f"{judge['model']}, median of {judge['repeats']} repeats" for judge in judges)
    return [*facts, f"Judge: {'; '.join(names)}." if names else "Nothing was judged."]


def _card(shown: Shown, number: int) -> Card:
    """One method's answer, its score, and the judge's words on it."""
    label, answers, judged = shown
    if answers is None or number not in answers.lines:
        return Card(label, None, "no answers of this method" if answers is None else "this question was not answered")
    line = answers.lines[number]
    text = line["choices"][0]["turns"][TURN - 1]
    mine = [one for one in (judged.lines if judged else ()) if (one["question_id"], one["turn"]) == (number, TURN)]
    warnings = [words for name, words in _CUT.items() if any(line.get(name, ())[TURN - 1 : TURN])]
    return Card(
        label,
        text,
        scores=tuple(one["score"] for one in mine),
        repeats=judged.record["judge"]["repeats"] if judged else 0,
        warnings=tuple(warnings),
        words=tuple((one.get("repeat", 0) + 1, one["score"], str(one.get("judgment", ""))) for one in mine),
    )
