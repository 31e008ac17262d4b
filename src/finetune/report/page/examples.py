"""Appendix E as one page: a question, the four methods' answers side by side, their scores and the judge's words.

The page is one file without any external resource; every text of a model, a judge or a question is escaped. Only the
first turn of a question is shown, as in the paper.
"""

import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from finetune.mt_bench.journal import read_items
from finetune.mt_bench.judged import Judged, current_records
from finetune.report.evidence.llama_evidence import PAPER_MODEL
from finetune.report.paper.layouts import METHODS, PAPER_MODELS
from finetune.store import records

TURN = 1


@dataclass(frozen=True)
class Answers:
    """The answers of one fine-tuned model.

    Attributes:
        path: Path of their record.
        record: The record: `run`, `template`, `options`, `model`.
        lines: Question id -> FastChat's answer line, with `cut` and `refused` a turn.
    """

    path: str
    record: Mapping[str, Any]
    lines: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        experiment: Name of the experiment.
        model: The model that ran in LLaMa-2-7B's place; `None`: none did.
        questions: FastChat's question lines to show, in order.
        answers: Method -> answers of one seed, where there are any.
        judged: Method -> judgments of the same seed's answers, where there are any.
    """

    experiment: str
    model: str | None
    questions: Sequence[Mapping[str, Any]]
    answers: Mapping[str, Answers]
    judged: Mapping[str, Judged]


def read_answers(folder: str | Path) -> Iterator[Answers]:
    """Read the answers below a folder that belong to a record `<model_id>.json` whose `run.kind` is `answers`.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    for path in current_records(folder):
        record = records.read_json(path)
        run = record.get("run", {})
        if run.get("kind") != "answers":
            continue
        lines = read_items(path.with_suffix(".jsonl"))
        own = {line["question_id"]: line for line in lines if line.get("config_hash") == run["config_hash"]}
        yield Answers(path.as_posix(), record, own)


def choose_page(
    *,
    experiment: str,
    model: str | None,
    questions: Iterable[Mapping[str, Any]],
    examples: Sequence[int],
    answers: Iterable[Answers],
    judgments: Iterable[Judged],
) -> Page:
    """Choose what the page shows: of each method the lowest seed that all methods with answers have, or its lowest.

    Args:
        experiment: Name of the experiment; answers and judgments of others are passed over.
        model: The model that ran in LLaMa-2-7B's place.
        questions: All question lines of the set.
        examples: Ids of the questions to show.
        answers: What `read_answers` found.
        judgments: What `finetune.mt_bench.judged.read_judgments` found.

    Raises:
        ValueError: If no example is named, or one is not among the questions.
    """
    by_id = {question["question_id"]: question for question in questions}
    unknown = [number for number in examples if number not in by_id]
    if not examples or unknown:
        raise ValueError(f"examples={[*examples]}; name at least one question, each of them of {sorted(by_id)}")
    found = _by_method(answers, experiment, model)
    judged = _by_method(judgments, experiment, model)
    common = set.intersection(*(set(seeds) for seeds in found.values())) if found else set()
    seeds = {method: min(common or of) for method, of in found.items()}
    return Page(
        experiment=experiment,
        model=model,
        questions=[by_id[number] for number in examples],
        answers={method: found[method][seed] for method, seed in seeds.items()},
        judged={method: judged[method][seed] for method, seed in seeds.items() if seed in judged.get(method, {})},
    )


def to_html(page: Page) -> str:
    """Render the page."""
    body = [
        f"<h1>Answers side by side: experiment {escape(page.experiment)}</h1>",
        "<p>First turns of MT-Bench questions, as in Appendix E of the paper (arXiv 2410.07383).</p>",
        '<ul class="facts">',
        *(f"<li{_mark(text)}>{escape(text)}</li>" for text in _facts(page)),
        "</ul>",
        *(_question(page, question) for question in page.questions),
    ]
    return _PAGE.format(title=escape(f"Answers: {page.experiment}"), style=_STYLE, body="\n".join(body))


def _by_method(found: Iterable[Any], experiment: str, model: str | None) -> dict[str, dict[int, Any]]:
    by_method: dict[str, dict[int, Any]] = {}
    for one in found:
        run = one.record["run"]
        if (run["experiment"], run["model"]) == (experiment, model) and run["method"] in METHODS.values():
            by_method.setdefault(run["method"], {})[run["seed"]] = one
    return by_method


def _facts(page: Page) -> list[str]:
    """Say whose answers these are, who judged them, and what the scores are worth."""
    paper = f"{PAPER_MODELS[PAPER_MODEL]} ({PAPER_MODEL})"
    if not page.model:
        return [f"Nothing ran in the place of {paper}."]
    titles = [one.record.get("model", {}).get("title") for one in page.answers.values()]
    label = f"{titles[0]} ({page.model})" if titles and titles[0] else page.model
    own = page.model == PAPER_MODEL
    facts = [f"{paper} is the paper's own model." if own else f"{label} stands in the place of {paper}."]
    seeds = {label: page.answers[m].record["run"]["seed"] for label, m in METHODS.items() if m in page.answers}
    if seeds:
        facts.append(f"Seeds shown: {', '.join(f'{name} {seed}' for name, seed in seeds.items())}.")
    templates = sorted({str(one.record.get("template")) for one in page.answers.values()})
    facts += [f"Conversation template: {', '.join(templates)}."] if templates else []
    cut, refused = (_number_of(page, name) for name in ("cut", "refused"))
    facts.append(f"Prompts longer than the model's window in all its answers: {cut} cut, {refused} refused.")
    judges = dict.fromkeys(
        f"{judge['model']}, median of {judge['repeats']} repeats"
        for judge in (one.record["judge"] for one in page.judged.values())
    )
    facts.append(f"Judge: {'; '.join(judges)}." if judges else "Nothing was judged.")
    if not all(one.record["judge"]["measures_quality"] for one in page.judged.values()):
        facts.append(_NO_QUALITY)
    return facts


def _number_of(page: Page, name: str) -> int:
    return sum(sum(map(bool, line.get(name, ()))) for one in page.answers.values() for line in one.lines.values())


def _mark(text: str) -> str:
    return ' class="warning"' if text == _NO_QUALITY else ""


def _question(page: Page, question: Mapping[str, Any]) -> str:
    number = question["question_id"]
    cards = "\n".join(_card(page, label, method, number) for label, method in METHODS.items())
    return (
        f'<section aria-labelledby="q{number}">\n'
        f'<h2 id="q{number}">Question {number} <small>{escape(question["category"])}</small></h2>\n'
        f'<p class="text prompt">{escape(question["turns"][TURN - 1])}</p>\n'
        f'<div class="answers">\n{cards}\n</div>\n</section>'
    )


def _card(page: Page, label: str, method: str, number: int) -> str:
    """One method's answer, its score, and the judge's words."""
    answers = page.answers.get(method)
    line = answers.lines.get(number) if answers else None
    parts = [f"<h3>{escape(label)}</h3>"]
    if line is None:
        reason = "no answers of this method" if answers is None else "this question was not answered"
        return "\n".join(["<article>", *parts, f'<p class="none">{reason}</p>', "</article>"])
    judged = page.judged.get(method)
    text = line["choices"][0]["turns"][TURN - 1]
    mine = [one for one in (judged.lines if judged else ()) if (one["question_id"], one["turn"]) == (number, TURN)]
    found = [one for one in mine if one.get("answer_sha256") == _sha256(text)]
    parts.append(_score(found, judged))
    parts += [f'<p class="warning">{_OTHER_ANSWER}</p>'] if len(found) < len(mine) else []
    flags = [text for name, text in _FLAGS.items() if _flag(line, name)]
    parts += [f'<p class="warning">{text}</p>' for text in flags]
    parts.append(f'<p class="text">{escape(text)}</p>' if text.strip() else '<p class="none">an empty answer</p>')
    parts += [_words(one) for one in found]
    return "\n".join(["<article>", *parts, "</article>"])


def _score(found: Sequence[Mapping[str, Any]], judged: Judged | None) -> str:
    if not found:
        return '<p class="score none">not judged</p>'
    scores = [one["score"] for one in found]
    repeats = judged.record["judge"]["repeats"]
    several = f" <small>median of {', '.join(f'{score:g}' for score in scores)}</small>" if len(scores) > 1 else ""
    lost = f" <small>{repeats - len(scores)} of {repeats} repeats failed</small>" if len(scores) < repeats else ""
    return f'<p class="score"><b>{statistics.median(scores):g}</b> of 10{several}{lost}</p>'


def _words(line: Mapping[str, Any]) -> str:
    title = f"Judge, repeat {line.get('repeat', 0) + 1}: {line['score']:g}"
    words = escape(str(line.get("judgment", "")))
    return f'<details><summary>{title}</summary><p class="text">{words}</p></details>'


def _sha256(text: str) -> str:
    """As `finetune.mt_bench.judging` names the answers that a prompt for the first turn held."""
    return hashlib.sha256(json.dumps([text]).encode()).hexdigest()


def _flag(line: Mapping[str, Any], name: str) -> bool:
    marks = line.get(name, ())
    return len(marks) >= TURN and bool(marks[TURN - 1])


_NO_QUALITY = "The scores are not a measure of quality: this judge only exercises the pipeline."

_OTHER_ANSWER = "Judgments of another answer than this one are not shown: run the judgments stage again."

_FLAGS = {
    "cut": "The prompt was longer than the model's window and was cut.",
    "refused": "The prompt was longer than the model's window and was refused.",
}

_STYLE = """
:root { color-scheme: light dark; --line: #c9c9c9; --soft: #f4f4f4; --faint: #5c5c5c; --warn: #8a4b00; }
@media (prefers-color-scheme: dark) {
  :root { --line: #4a4a4a; --soft: #242424; --faint: #adadad; --warn: #ffb454; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 0; }
.facts { list-style: none; padding: 0; }
small, .none { color: var(--faint); font-weight: normal; }
.warning { color: var(--warn); font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { border-left: 3px solid var(--line); padding-left: 1rem; max-width: 50rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
article { min-width: 0; padding: 1rem; border: 1px solid var(--line); border-radius: .4rem; background: var(--soft); }
article p { margin: .6rem 0; }
.score b { font-size: 1.4rem; }
details { border-top: 1px solid var(--line); padding-top: .4rem; margin-top: .4rem; }
summary { cursor: pointer; color: var(--faint); }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
