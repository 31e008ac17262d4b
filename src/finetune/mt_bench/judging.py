"""Single-answer grading of a model's answers by a judge model, through FastChat's prompts and parsing.

What FastChat's ``gen_judgment.py --mode single`` does, with what it lacks: any judge, resume, failures that are counted
and done again instead of written as -1. Source: FastChat, ``llm_judge/gen_judgment.py`` and ``common.py``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.mt_bench.client import ItemFailed, JudgeClient, JudgeOptions
from finetune.mt_bench.journal import Journal, write_items
from finetune.mt_bench.questions import PROMPT_FIELDS
from finetune.store import records

Line = dict[str, Any]
Key = tuple[int, int, str, str, str, int]

RATINGS = (1, 10)
JUDGE_TEMPLATE = "chatgpt"  # of FastChat: system prompt and user prompt, nothing else


@dataclass(frozen=True)
class Item:
    """One judgment to make.

    Attributes:
        key: question, turn (1 or 2), model, prompt, judge, repeat (from 0).
        answer_sha256: of the answers that the prompt holds.
        match: FastChat's ``MatchSingle``.
    """

    key: Key
    answer_sha256: str
    match: Any


@dataclass(frozen=True)
class Bench:
    """What all judgments share, from :mod:`finetune.mt_bench.questions`.

    Attributes:
        questions: FastChat's.
        references: answers by question id.
        prompts: of the judge, by name.
    """

    questions: Sequence[Mapping[str, Any]]
    references: Mapping[int, Mapping[str, Any]]
    prompts: Mapping[str, Mapping[str, Any]]

    def digest(self, options: JudgeOptions, version: int | None = None) -> str:
        """Identity of all that decides a judgment but the answer; not the endpoint, which says where the judge is."""
        texts = {name: self.prompts[name] for name in PROMPT_FIELDS}
        identity = {
            "version": version,
            "kind": "judgments",
            "judge": {"model": options.model} | options.sampling(),
            "prompts": {name: [text["system_prompt"], text["prompt_template"]] for name, text in texts.items()},
            "questions": [[asked["question_id"], asked["category"], asked["turns"]] for asked in self.questions],
            "references": {str(number): answer["choices"][0]["turns"] for number, answer in self.references.items()},
        }
        return records.config_hash(identity)


def judge_answers(
    bench: Bench,
    answers: Mapping[int, Mapping[str, Any]],
    model_id: str,
    folder: str | Path,
    options: JudgeOptions,
    *,
    digest: str | None = None,
    progress_bar: bool = False,
) -> dict[str, int]:
    """Judge both turns of every answer, ``repeats`` times each; what is judged already is not judged again.

    Each judgment is on the disk as soon as it is there. FastChat's module ``llm_judge.common`` is changed for the time
    of the call, so one call at a time in a process.

    Args:
        bench: questions, references, prompts.
        answers: FastChat's answer lines by question id.
        model_id: whose answers.
        folder: for ``<model_id>.jsonl`` (judgments that have a rating), ``<model_id>.failures.jsonl`` (what this run
            failed at) and ``earlier/`` (judgments of other answers or another configuration, reused when those return).
        options: the judge.
        digest: identity of bench and judge; None computes it.
        progress_bar: whether a bar over the judgments is shown.

    Returns:
        ``items``, of which ``judged`` and ``failed``; ``reused``: those judged before this run.

    Raises:
        JudgeUnusable: if the judge can't be used at all; what was judged is kept.
        ValueError: if an answer is missing, or files can't be read or written; what was judged is kept.
    """
    missing = [question["question_id"] for question in bench.questions if question["question_id"] not in answers]
    if missing:
        raise ValueError(f"{model_id} has no answer to questions {missing}: run the answers stage for it.")
    digest = digest or bench.digest(options)
    items = list(make_items(bench, answers, model_id, options))
    path = Path(folder) / f"{model_id}.jsonl"
    journal, earlier = Journal(path, _key), Journal(path.parent / "earlier" / path.name, _full_key)
    valid = _valid(items, digest, journal, earlier)
    pending = [item for item in items if item.key not in valid]
    client = JudgeClient(options) if pending else nullcontext()  # without a key nothing is moved
    _set_aside(valid, journal, earlier)
    failures: list[Line] = []
    bar = tqdm(total=len(items), initial=len(valid), desc=model_id, disable=not progress_bar, leave=False)
    try:
        with client, bar:
            if pending:
                _judge(pending, client, digest, journal, failures, bar)
    finally:
        failures.sort(key=lambda line: (line["question_id"], line["turn"], line["repeat"]))
        write_items(failures_path(folder, model_id), failures)
    journal.rewrite(journal.items[item.key] for item in items if item.key in journal.items)
    return {"items": len(items), "judged": len(journal.items), "failed": len(failures), "reused": len(valid)}


def failures_path(folder: str | Path, model_id: str) -> Path:
    """Where the last run's failures are listed."""
    return Path(folder) / f"{model_id}.failures.jsonl"


def make_items(
    bench: Bench, answers: Mapping[int, Mapping[str, Any]], model_id: str, options: JudgeOptions
) -> Iterator[Item]:
    """The judgments of a model's answers, ordered by question, turn and repeat.

    As in FastChat: ``single-v1`` for the first turn, ``-multi-turn`` for both; the ``math`` prompts with references for
    the categories of ``NEED_REF_CATS``.
    """
    from fastchat.llm_judge.common import NEED_REF_CATS
    from fastchat.llm_judge.gen_judgment import make_judge_single, make_match_single

    judges = make_judge_single(options.model, bench.prompts)
    with_reference = [question for question in bench.questions if question["category"] in NEED_REF_CATS]
    others = [question for question in bench.questions if question["category"] not in NEED_REF_CATS]
    matches = []
    for group, kind, held in ((others, "default", None), (with_reference, "math", {options.model: bench.references})):
        for name, multi_turn in ((kind, False), (f"{kind}-mt", True)):
            matches += make_match_single(
                group, [model_id], {model_id: answers}, judges[name], ref_answers=held, multi_turn=multi_turn
            )
    for match in sorted(matches, key=lambda match: (match.question["question_id"], match.multi_turn)):
        turn = 2 if match.multi_turn else 1
        told = json.dumps(match.answer["choices"][0]["turns"][:turn])
        digest = hashlib.sha256(told.encode()).hexdigest()
        asked = (match.question["question_id"], turn, model_id, match.judge.prompt_template["name"], options.model)
        for repeat in range(options.repeats):
            yield Item((*asked, repeat), digest, match)


@contextmanager
def fastchat_asks(ask: Callable[[Sequence[Mapping[str, str]]], str], judge: str) -> Iterator[None]:
    """Let FastChat's ``run_judge_single`` ask through a function of ours, for the time of the block.

    FastChat knows eleven judges by name and looks for a template by a part of the name; its API function needs an
    ``openai`` package of 2023 and turns errors into the text ``$ERROR$``.
    """
    from fastchat.conversation import get_conv_template
    from fastchat.llm_judge import common

    ours = {
        "chat_completion_openai": lambda model, conv, temperature, max_tokens: ask(conv.to_openai_api_messages()),
        "get_conversation_template": lambda model: get_conv_template(JUDGE_TEMPLATE),
        "OPENAI_MODEL_LIST": (*common.OPENAI_MODEL_LIST, judge),
    }
    theirs = {name: getattr(common, name) for name in ours}
    try:
        for name, value in ours.items():
            setattr(common, name, value)
        yield
    finally:
        for name, value in theirs.items():
            setattr(common, name, value)


def _judge(
    pending: Sequence[Item], client: JudgeClient, digest: str, journal: Journal, failures: list[Line], bar: tqdm
) -> None:
    """Judge items in several threads; this one writes. What is under way when something stops it is waited for."""

    def keep(item: Item, done: Future[Line]) -> None:
        try:
            if item.key not in journal.items:  # an interruption may come after the writing
                journal.append(done.result())
        except ItemFailed as error:
            failures.append(_failure(item, error))
        bar.update()

    with fastchat_asks(client.complete, client.options.model), ThreadPoolExecutor(client.options.parallel) as pool:
        waiting: dict[Future[Line], Item] = {}
        try:
            for item in pending:
                waiting[pool.submit(judge_item, item, client, digest)] = item
            for done in as_completed(list(waiting)):
                keep(waiting[done], done)
                del waiting[done]
        except BaseException:  # Ctrl-C too: begun requests are paid for
            under_way = {done: item for done, item in waiting.items() if not done.cancel()}
            for done in as_completed(under_way):
                with suppress(ValueError):  # the first one is what is raised
                    keep(under_way[done], done)
            raise


def judge_item(item: Item, client: JudgeClient, digest: str) -> Line:
    """One judgment by FastChat's ``run_judge_single``, inside :func:`fastchat_asks`.

    Raises:
        ItemFailed: if the judge gave no rating from 1 to 10.
        JudgeUnusable: see :class:`finetune.mt_bench.client.JudgeClient`.
    """
    from fastchat.llm_judge.common import run_judge_single

    question, turn, model, prompt, judge, repeat = item.key
    match = item.match
    try:
        score, user_prompt, judgment = run_judge_single(
            match.question, match.answer, match.judge, match.ref_answer, multi_turn=match.multi_turn
        )
    except SyntaxError as error:  # FastChat evaluates the rating as Python: [[08]] is none
        raise ItemFailed(f"no number as rating ({error.text!r})", client.attempts) from None
    cut = " (cut at max_tokens)" if client.finish_reason == "length" else ""
    if score == -1:
        raise ItemFailed(f"no rating [[1]] to [[10]] in the judgment{cut}", client.attempts)
    if not RATINGS[0] <= score <= RATINGS[1]:
        raise ItemFailed(f"the rating {score} is not from {RATINGS[0]} to {RATINGS[1]}", client.attempts)
    return {
        "question_id": question,
        "model": model,
        "judge": [judge, prompt],
        "user_prompt": user_prompt,
        "judgment": judgment,
        "score": score,
        "turn": turn,
        "tstamp": time.time(),
        "repeat": repeat,
        "answer_sha256": item.answer_sha256,
        "config_hash": digest,
    }


def _valid(items: Sequence[Item], digest: str, journal: Journal, earlier: Journal) -> dict[Key, Line]:
    """Judgments of these very answers by this configuration, those of ``earlier/`` too: old answers may be back."""
    valid = {}
    for item in items:
        full = (*item.key, item.answer_sha256, digest)
        line = journal.items.get(item.key)
        if line is None or _full_key(line) != full:
            line = earlier.items.get(full)
        if line is not None:
            valid[item.key] = line
    return valid


def _set_aside(valid: Mapping[Key, Line], journal: Journal, earlier: Journal) -> None:
    """Leave the valid judgments in the journal; others are kept in ``earlier/``, never mixed."""
    for key, line in journal.items.items():
        if valid.get(key) != line and _full_key(line) not in earlier.items:
            earlier.append(line)
    if journal.items != valid or not journal.path.exists():
        journal.rewrite(valid.values())


def _key(line: Mapping[str, Any]) -> Key:
    judge, prompt = line["judge"]
    return line["question_id"], line["turn"], line["model"], prompt, judge, line["repeat"]


def _full_key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return *_key(line), line["answer_sha256"], line["config_hash"]


def _failure(item: Item, error: ItemFailed) -> Line:
    question, turn, _, prompt, judge, repeat = item.key
    return {
        "question_id": question,
        "turn": turn,
        "repeat": repeat,
        "judge": [judge, prompt],
        "error": str(error),
        "attempts": error.attempts,
        "tstamp": time.time(),
    }
