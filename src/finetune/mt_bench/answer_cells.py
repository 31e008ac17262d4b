"""Cells of answers: the checkpoints of all methods and seeds of one model, each with its own file and record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune import models
from finetune.data.chat import chat_template
from finetune.models.merged import MERGED, read_merged
from finetune.mt_bench.answers import AnswerOptions, Speaker, answer_questions
from finetune.mt_bench.cells import each, header, model_id
from finetune.mt_bench.generation import sampling_settings
from finetune.mt_bench.judged import vouched_answers
from finetune.mt_bench.questions import load_questions
from finetune.store import records
from finetune.store.files import sha256
from finetune.training import memory
from finetune.training.processes import make_accelerator

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}

# What of a checkpoint's folder, besides weights, decides its answers.
SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt"),
)


def answer_cells(
    config: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], models_folder: Path, folder: Path
) -> None:
    """All answers of a model; ``<method>/<model_id>.jsonl``, its record ``.json``, and ``<method>/cell.json``.

    Args:
        config: composed configuration; ``checkpoint``, with one method and seed, stands in for that seed's folder.
        methods, seeds: of the trained checkpoints.
        models_folder: holds ``<method>/seed<seed>/`` each, as training writes them.
        folder: for the files of this model.

    Raises:
        ValueError: if the configuration is wrong, or any seed failed (after all others are done).
    """
    given = config["checkpoint"]
    if given is not None and len(methods) * len(seeds) > 1:
        raise ValueError(f"checkpoint={given} is one model, received {list(methods)} with seeds {list(seeds)}.")
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])

    def work(own: Mapping[str, Any], seed: int) -> None:
        method = own["method"]["name"]
        answer_one(own, seed, Path(given or models_folder / method / f"seed{seed}"), folder / method)

    each(config, methods, seeds, folder, work)


def answer_one(config: Mapping[str, Any], seed: int, checkpoint: Path, folder: Path) -> Path:
    """Answer with one checkpoint, a merged model with its tokenizer, and write a record beside the answers.

    What is finished under the same configuration is reused.

    Returns:
        The record's path.

    Raises:
        ValueError: on a wrong configuration or checkpoint, and as :func:`finetune.mt_bench.answers.answer_questions`.
    """
    options, dtype = _options(config["scale"]["answers"])
    place = config["questions"]
    file = Path(place["root"]) / place["folder"] / place["questions"]
    questions = load_questions(file)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no model: train seed {seed} first, or give checkpoint=FOLDER.")
    group = model_group(checkpoint)
    tokenizer = models.load_tokenizer(group, "")
    template = chat_template(config["model"].get("template"), tokenizer)
    _check_template(checkpoint, template.name)
    settings = {name: sha256(checkpoint / name) for name in SETTINGS if (checkpoint / name).is_file()}
    model = {"sha256": models.fingerprint(group, ""), "settings": settings}
    identity = {  # all that decides the answers, so not batch size, device and paths
        "version": config["version"],
        "kind": "answers",
        "model": model,
        "template": template.name,
        "questions_sha256": sha256(file),
        "options": {name: value for name, value in asdict(options).items() if name != "batch_size"},
        "dtype": dtype,
    }
    digest, name = records.config_hash(identity), model_id(config, seed)
    answers, path = folder / f"{name}.jsonl", folder / f"{name}.json"
    start = header(config, "answers", seed, digest, file, questions)
    if _is_finished(path, answers, start, questions):
        log.info("%s is finished, reused", path)
        return path
    device = make_accelerator(config["device"], "fp32").device
    network = models.load_causal(group, "", seed, DTYPES[dtype]).to(device).eval()
    speaker = Speaker(network, tokenizer, template, options)
    facts = answer_questions(speaker, questions, answers, model_id=name, digest=digest, progress_bar=config["progress"])
    record = start | facts
    record |= {
        "status": "finished",
        "identity": identity,
        "options": asdict(options) | {"dtype": dtype},
        "template": template.name,
        "model": {"title": config["model"]["title"], "checkpoint": str(checkpoint)} | model,
        "answers": {"file": answers.name, "sha256": sha256(answers)},
        "sampling": sampling_settings(network),
        "precision": str(network.dtype).removeprefix("torch."),
        "device": memory.device_name(device),
        "provenance": records.provenance(),
    }
    records.write_record(path, record)
    log.info("%s answers in %.0f s  %s", facts["counts"]["questions"], facts["seconds"], path)
    return path


def _is_finished(path: Path, answers: Path, start: Mapping[str, Any], questions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the record is this one's, and its file holds an answer to each question as it was written."""
    try:
        record, asked = records.read_record(path), {question["question_id"] for question in questions}
        return (
            {name: record.get(name) for name in start} == start
            and record.get("status") == "finished"
            and vouched_answers(answers).keys() == asked
        )
    except ValueError:  # missing or not sound: it is done again
        return False


def model_group(checkpoint: Path) -> dict[str, Any]:
    """A folder as the ``model`` group that :mod:`finetune.models` reads."""
    return {"checkpoint": str(checkpoint), "folder": "", "revision": None, "random_weights": False}


def _options(group: Mapping[str, Any]) -> tuple[AnswerOptions, str]:
    """``scale.answers``: the options, and the weights' data type, which is the loader's."""
    return AnswerOptions(**{name: value for name, value in group.items() if name != "dtype"}), group["dtype"]


def _check_template(checkpoint: Path, name: str) -> None:
    """Refuse to ask a model in another template than it was trained with; a checkpoint from elsewhere does not say.

    Raises:
        ValueError: also if its files are others than training wrote.
    """
    if (checkpoint / MERGED).is_file():
        trained = read_merged(checkpoint).get("template")
        if trained != name:
            raise ValueError(f"{checkpoint} was trained with template {trained!r}, model.template is {name!r}.")
