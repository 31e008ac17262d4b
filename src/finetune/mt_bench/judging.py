"""Single-answer grading of a model's answers by a judge model, through FastChat's prompts.

What FastChat's ``gen_judgment.py --mode single`` does, with what it lacks: any judge, resume, failures that are counted
and done again instead of written as -1. Source: FastChat, ``llm_judge/gen_judgment.py`` and ``common.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from finetune.mt_bench.client import CUT, ItemFailed, JudgeClient, JudgeOptions
from finetune.mt_bench.journal import Journal, read_items, write_items
from finetune.mt_bench.judged import count_differing, fault_of
from finetune.mt_bench.questions import PROMPT_FIELDS, answer_sha256
from finetune.mt_bench.rating import FASTCHAT, NoRating, read_rating
from finetune.mt_bench.scores import FAILED
from finetune.store import records

Line = dict[str, Any]

JUDGE_TEMPLATE = "chatgpt"  # of FastChat: system prompt and user prompt, nothing else


class Key(NamedTuple):
    """What makes a judgment the same: ``answer_sha256`` is of the answers in its prompt."""

    question_id: int
    turn: int
    model: str
    prompt: str
    judge: str
    repeat: int
    answer_sha256: str
    config_hash: str

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Key:
        """The key of a judgment's line."""
        judge, prompt = line["judge"]
        held = {name: line[name] for name in cls._fields if name not in ("prompt", "judge")}
        return cls(**held, prompt=prompt, judge=judge)


@dataclass(frozen=True)
class Bench:
    """What all judgments share: questions, reference answers by question id, the judge's prompts by name."""

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
    questions: Sequence[Mapping[str, Any]],
    references: Mapping[int, Mapping[str, Any]],
    prompts: Mapping[str, Mapping[str, Any]],
    answers: Mapping[int, Mapping[str, Any]],
    model_id: str,
    folder: str | Path,
    options: JudgeOptions,
    digest: str | None = None,
) -> dict[str, int]:
    """Judge both turns of every answer, ``repeats`` times each; what is judged already is not judged again.

    Each judgment is on the disk as soon as it is there. What is there is not believed but checked
    (:func:`finetune.mt_bench.judged.fault_of`); its rating is read anew from the judge's words, so that another
    ``parsing`` asks nobody again. FastChat's module ``llm_judge.common`` is changed for the time of the call, so one
    call at a time in a process.

    Args:
        questions, references, prompts: as of :class:`Bench`.
        answers: FastChat's answer lines by question id.
        model_id: whose answers.
        folder: for ``<model_id>.jsonl`` (judgments that have a rating), ``<model_id>.failures.jsonl`` (what this run
            failed at) and ``earlier/`` (judgments of other answers or another configuration, reused when those return).
        options: of the judge.
        digest: identity of bench and judge; None computes it.

    Returns:
        ``items``, of which ``judged`` and ``failed``; ``differing``: those that the two parsings read differently;
        ``reused``: those judged before this run.

    Raises:
        JudgeUnusable: if the judge can't be used at all; what was judged is kept.
        ValueError: if an answer is missing, or files can't be read or written; what was judged is kept.
    """
    bench = Bench(questions, references, prompts)
    missing = [question["question_id"] for question in questions if question["question_id"] not in answers]
    if missing:
        raise ValueError(f"{model_id} has no answer to questions {missing}: run the answers stage for it.")
    items = dict(make_items(bench, answers, model_id, options, digest or bench.digest(options)))
    journal = Journal(Path(folder) / f"{model_id}.jsonl", Key.of, _fault)
    valid = {}
    for key, line in journal.recall(items).items():  # old answers may be back
        with suppress(NoRating):
            valid[key] = line | {"score": read_rating(line["judgment"], options.parsing)}
    unrated = {} if options.ask_again else _unrated(failures_path(folder, model_id), model_id, options)
    failures = [line for key, line in unrated.items() if key in items.keys() - valid.keys()]
    pending = {key: match for key, match in items.items() if key not in valid and key not in unrated}
    client = JudgeClient(options) if pending else None  # without a key nothing is moved
    journal.keep(valid)
    bar = tqdm(
        total=len(items), initial=len(items) - len(pending), desc=model_id, disable=not options.progress, leave=False
    )
    try:
        with client or nullcontext(), bar:
            if client is not None:
                _judge(pending, client, journal, failures, bar)
    finally:
        failures.sort(key=lambda line: (line["question_id"], line["turn"], line["repeat"]))
        write_items(failures_path(folder, model_id), failures)
    journal.rewrite(journal.items[key] for key in items if key in journal.items)
    counts = {"items": len(items), "judged": len(journal.items), "failed": len(failures)}
    return counts | {"differing": count_differing(journal.items.values(), failures), "reused": len(valid)}


def _fault(line: Mapping[str, Any]) -> str | None:
    """Why a line of the journal is no judgment: fields that its key needs are missing, or as ``fault_of``."""
    judge = line.get("judge")
    if not isinstance(judge, list) or len(judge) != 2 or {*Key._fields} - {"prompt", "judge"} - {*line}:
        return "it lacks what a judgment is known by"
    if line.get("score") == FAILED:
        return "it has no rating"
    return fault_of(line)


def _unrated(path: Path, model_id: str, options: JudgeOptions) -> dict[Key, Line]:
    """What an earlier run listed as answered without a rating, by the same parsing."""
    lines = read_items(path) if path.is_file() else []
    known = [line for line in lines if "judgment" in line and line.get("parsing") == options.parsing]
    return {Key.of(line | {"model": model_id}): line for line in known}


def failures_path(folder: str | Path, model_id: str) -> Path:
    """Where the last run's failures are listed."""
    return Path(folder) / f"{model_id}.failures.jsonl"


def make_items(
    bench: Bench, answers: Mapping[int, Mapping[str, Any]], model_id: str, options: JudgeOptions, digest: str
) -> Iterator[tuple[Key, Any]]:
    """The judgments to make of a model's answers, each with FastChat's ``MatchSingle``: by question, turn, repeat.

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
        told_sha256 = answer_sha256(match.answer["choices"][0]["turns"][:turn])
        asked = (match.question["question_id"], turn, model_id, match.judge.prompt_template["name"], options.model)
        for repeat in range(options.repeats):
            yield Key(*asked, repeat, told_sha256, digest), match


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


def _judge(pending: Mapping[Key, Any], client: JudgeClient, journal: Journal, failures: list[Line], bar: tqdm) -> None:
    """Judge items in several threads; this one writes. What is under way when something stops it is waited for."""

    def keep(key: Key, done: Future[Line]) -> None:
        try:
            if key not in journal.items:  # an interruption may come after the writing
                journal.append(done.result())
        except ItemFailed as error:
            held = ("question_id", "turn", "repeat", "answer_sha256", "config_hash")
            asked = {name: getattr(key, name) for name in held} | {"parsing": client.options.parsing}
            told = {"error": str(error), "attempts": error.attempts, "tstamp": time.time()} | error.said
            failures.append(asked | {"judge": [key.judge, key.prompt]} | told)
        bar.update()

    def ask(messages: Sequence[Mapping[str, str]]) -> str:
        client.complete(messages)
        return "[[1]]"  # FastChat makes the prompt; the judge's words are read by judge_item

    with fastchat_asks(ask, client.options.model), ThreadPoolExecutor(client.options.parallel) as pool:
        waiting: dict[Future[Line], Key] = {}
        try:
            for key, match in pending.items():
                waiting[pool.submit(judge_item, key, match, client)] = key
            for done in as_completed(list(waiting)):
                keep(waiting[done], done)
                del waiting[done]
        except BaseException:  # Ctrl-C too: begun requests are paid for
            under_way = {done: key for done, key in waiting.items() if not done.cancel()}
            for done in as_completed(under_way):
                with suppress(ValueError):  # the first one is what is raised
                    keep(under_way[done], done)
            raise


def judge_item(key: Key, match: Any, client: JudgeClient) -> Line:
    """One judgment, asked by FastChat's ``run_judge_single`` in :func:`fastchat_asks`; ItemFailed without a rating."""
    from fastchat.llm_judge.common import run_judge_single

    _, user_prompt, _ = run_judge_single(
        match.question, match.answer, match.judge, match.ref_answer, multi_turn=match.multi_turn
    )
    parsing, judgment, cut = client.options.parsing, client.words, client.finish_reason in CUT
    try:
        if cut and parsing != FASTCHAT:  # what it quoted or thought so far is not what it would have said in the end
            raise NoRating("the judgment was cut")
        score = read_rating(judgment, parsing, "\n".join(match.answer["choices"][0]["turns"][: key.turn]))
    except NoRating as error:
        ended = f" (finish_reason {client.finish_reason!r}: see judge.max_tokens)" if cut else ""
        raise ItemFailed(f"{error}{ended}", client.attempts, {"judgment": judgment}) from None
    return {
        "question_id": key.question_id,
        "model": key.model,
        "judge": [key.judge, key.prompt],
        "user_prompt": user_prompt,
        "judgment": judgment,
        "score": score,
        "turn": key.turn,
        "tstamp": time.time(),
        "repeat": key.repeat,
        "answer_sha256": key.answer_sha256,
        "config_hash": key.config_hash,
    }
