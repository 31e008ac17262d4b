"""A model's answers to MT-Bench questions, in FastChat's file format: batched, resumable, the same in any batch.

What is answered, with which prompt, temperature and text handling follows FastChat's ``llm_judge/gen_model_answer.py``;
that script itself knows CUDA only, answers one by one, and starts from the beginning after a kill.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from finetune.data.chat import ChatTemplate, special_tokens
from finetune.models import positions
from finetune.mt_bench.generation import generate, row_generator, stop_ids
from finetune.mt_bench.journal import Journal
from finetune.mt_bench.questions import temperature, turns_of


@dataclass(frozen=True)
class AnswerOptions:
    """How questions are answered.

    Attributes:
        max_new_tokens: of one turn; fewer where the model's window leaves less room. FastChat's default is 1024.
        batch_size: questions at a time; changes no answer but by the rounding of batched sums: in float32 none was seen
            to change, in bfloat16 some will.
        long_prompts: what becomes of a prompt that leaves fewer than ``reserve`` tokens of the model's window for the
            answer: ``cut`` keeps its BOS and its last tokens, ``refuse`` gives an empty answer.
        reserve: tokens of the window kept free for the answer.
        seed: of sampling.
    """

    max_new_tokens: int = 1024
    batch_size: int = 8
    long_prompts: str = "cut"
    reserve: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it: empty if it was refused, else with the new tokens that the answer may have."""

    input_ids: list[int]
    limit: int
    cut: bool = False


@dataclass(frozen=True)
class Turn:
    """One answer of a question; as it is here, to a prompt that was refused."""

    text: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    cut: bool = False
    refused: bool = True


@dataclass(frozen=True)
class Speaker:
    """A causal language model in evaluation mode, on its device, with the template that it was trained with."""

    model: nn.Module
    tokenizer: Any
    template: ChatTemplate
    options: AnswerOptions

    def batches(self, questions: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
        """Questions of like length together; the longest first, so that memory runs out at once or not at all."""
        lengths = {q["question_id"]: len(self.encode(q["turns"][:1])) for q in questions}
        ordered = sorted(questions, key=lambda q: (-lengths[q["question_id"]], q["question_id"]))
        for start in range(0, len(ordered), self.options.batch_size):
            yield ordered[start : start + self.options.batch_size]

    def encode(self, turns: Sequence[str]) -> list[int]:
        """Token ids of a prompt, which the model's vocabulary must have."""
        ids = self.template.encode(self.tokenizer, turns).input_ids
        entries = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= entries:
            raise ValueError(
                f"a prompt has token {max(ids)}, the model's vocabulary {entries} tokens: this is the tokenizer of "
                "another model."
            )
        return ids

    def answer(self, batch: Sequence[Mapping[str, Any]]) -> list[list[Turn]]:
        """All turns of some questions."""
        answered: list[list[Turn]] = [[] for _ in batch]
        for turn in range(len(batch[0]["turns"])):  # all have two
            prompts = []
            for question, before in zip(batch, answered, strict=True):
                told = [
                    text
                    for asked, found in zip(question["turns"][:turn], before, strict=True)
                    for text in (asked, found.text)
                ]
                ids = self.encode([*told, question["turns"][turn]])
                prompts.append(fit(ids, positions(self.model), self.tokenizer.bos_token_id, self.options))
            for row, found in self._turn(batch, turn, prompts).items():
                answered[row].append(found)
        return answered

    def _turn(self, batch: Sequence[Mapping[str, Any]], turn: int, prompts: Sequence[Prompt]) -> dict[int, Turn]:
        stops = stop_ids(self.model, self.tokenizer, self.template.stop_token_ids)
        turns = {row: Turn() for row, prompt in enumerate(prompts) if not prompt.input_ids}
        open_rows = sorted({*range(len(prompts))} - {*turns}, key=lambda row: prompts[row].limit)
        # One call for each limit: no row runs past the window while a neighbour with more room is still writing.
        for limit, group in groupby(open_rows, key=lambda row: prompts[row].limit):
            rows = list(group)
            ids = [batch[row]["question_id"] for row in rows]
            try:
                written = generate(
                    self.model,
                    [prompts[row].input_ids for row in rows],
                    limit,
                    [temperature(batch[row]) for row in rows],
                    [row_generator(self.options.seed, question, turn) for question in ids],
                    stops,
                )
            except torch.OutOfMemoryError:
                raise ValueError(
                    f"out of memory with {len(rows)} questions at a time and {limit} new tokens: set "
                    "scale.answers.batch_size lower and run again; what is answered is kept."
                ) from None
            except ValueError as error:
                raise ValueError(f"questions {', '.join(map(str, ids))}, turn {turn + 1}: {error}") from None
            for row, tokens in zip(rows, written, strict=True):
                prompt, text = prompts[row], to_text(tokens, self.tokenizer, self.template)
                turns[row] = Turn(text, len(prompt.input_ids), len(tokens), prompt.cut, False)
        return turns


def answer_questions(
    speaker: Speaker,
    questions: Sequence[Mapping[str, Any]],
    journal_path: str | Path,
    *,
    model_id: str,
    digest: str,
    progress_bar: bool,
) -> dict[str, Any]:
    """Answer the questions that a file has no answer to; each is on the disk as soon as its batch is done.

    Args:
        journal_path: ``<model_id>.jsonl``, one answer a line; in the end sorted by question.
        model_id: FastChat's name of the model in the answers.
        digest: identity of model, questions and options. Answers of another one are kept in ``earlier/``.

    Returns:
        ``counts`` (questions; prompts cut and refused, of either turn), ``tokens`` (prompt, new), ``seconds``; all of
        the whole file, whichever run wrote it.

    Raises:
        ValueError: if tokenizer and model do not fit, the window is too small, the model's outputs are NaN, memory or
            the disk is exhausted; what is answered is kept.
    """
    _check_window(speaker.model, speaker.options)
    journal = Journal(
        journal_path,
        key=lambda item: (item["question_id"], item["config_hash"]),
        fault=lambda item: fault_of(item, model_id),
        checked=True,
    )
    keys = sorted((question["question_id"], digest) for question in questions)
    journal.keep(journal.recall(keys))
    pending = [question for question in questions if (question["question_id"], digest) not in journal.items]
    done = len(journal.items)
    with tqdm(total=len(questions), initial=done, desc=model_id, disable=not progress_bar, leave=False) as bar:
        for batch in speaker.batches(pending):
            started = time.perf_counter()
            answered = speaker.answer(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            for question, turns in zip(batch, answered, strict=True):
                said = {"model_id": model_id, "config_hash": digest, "question_id": question["question_id"]}
                journal.append(_line(said, turns, seconds))
                bar.update()
    answers = [journal.items[key] for key in keys]
    journal.rewrite(answers)
    counts = {name: sum(sum(item[name]) for item in answers) for name in ("cut", "refused")}
    tokens = {name: sum(sum(item[f"{name}_tokens"]) for item in answers) for name in ("prompt", "new")}
    seconds = sum(item["seconds"] for item in answers)
    return {"counts": {"questions": len(answers)} | counts, "tokens": tokens, "seconds": seconds}


def fit(input_ids: Sequence[int], window: int | None, bos: int | None, options: AnswerOptions) -> Prompt:
    """Cut or refuse a prompt that leaves too little of the window, so that prompt and answer never exceed it.

    Args:
        window: positions of the model; None for no limit.
        bos: the id that a cut prompt keeps in front if it had it there.
    """
    ids = list(input_ids)
    if window is None:
        return Prompt(ids, options.max_new_tokens)
    free = min(options.reserve, options.max_new_tokens)
    if len(ids) + free <= window:
        return Prompt(ids, min(options.max_new_tokens, window - len(ids)))
    if options.long_prompts == "refuse":
        return Prompt([], 0)
    head = ids[:1] if bos is not None and ids[0] == bos else []
    return Prompt(head + ids[len(ids) - (window - free - len(head)) :], free, cut=True)


def to_text(tokens: Sequence[int], tokenizer: Any, template: ChatTemplate) -> str:
    """Text of new tokens as gen_model_answer makes it: cut at the template's stops, without special tokens."""
    stop = next((place for place, token in enumerate(tokens) if token in template.stop_token_ids), len(tokens))
    text = template.cut_at_stop(tokenizer.decode(tokens[:stop], spaces_between_special_tokens=False))
    for special in sorted(special_tokens(tokenizer)):
        text = text.replace(special, "")
    return text.strip()


def _line(said: Mapping[str, Any], turns: Sequence[Turn], seconds: float) -> dict[str, Any]:
    """An answer in FastChat's format, and what this project adds."""
    name = hashlib.sha256("/".join(map(str, said.values())).encode()).hexdigest()[:22]
    return {
        **said,
        "answer_id": name,
        "choices": [{"index": 0, "turns": [turn.text for turn in turns]}],
        "tstamp": time.time(),
        "seconds": seconds,
    } | {name: [getattr(turn, name) for turn in turns] for name in ("prompt_tokens", "new_tokens", "cut", "refused")}


def fault_of(item: Mapping[str, Any], model_id: str) -> str | None:
    """Why a line of the journal is no answer of this model, None if it is one."""
    if item.get("model_id") != model_id:
        return f"an answer of {item.get('model_id')!r:.80}"
    if type(item.get("question_id")) is not int or not isinstance(item.get("config_hash"), str):
        return "it lacks what an answer is known by"
    kinds = {"prompt_tokens": int, "new_tokens": int, "cut": bool, "refused": bool}
    lists = {name: item.get(name) for name in kinds}
    if turns_of(item) is None or any(
        not isinstance(values, list) or [type(value) for value in values] != [kinds[name]] * 2
        for name, values in lists.items()
    ):
        return "it has not two turns with their tokens"
    seconds = item.get("seconds")
    if isinstance(seconds, int | float) and 0 <= seconds < math.inf:
        return None
    return f"it took seconds={seconds!r:.40}"


def _check_window(model: nn.Module, options: AnswerOptions) -> None:
    window = positions(model)
    free = min(options.reserve, options.max_new_tokens)
    if window is not None and free > window - 2:  # BOS and one token of the question
        raise ValueError(
            f"reserve={options.reserve} and max_new_tokens={options.max_new_tokens} leave no room for a prompt; this "
            f"model has {window} positions: set scale.answers.reserve to {window // 2} or less."
        )
