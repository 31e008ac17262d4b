"""A cell of answers: the checkpoints of all seeds of one model and method, each with its own file and record."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from finetune import models
from finetune.data.chat import chat_template
from finetune.mt_bench.answers import AnswerOptions, answer_questions
from finetune.mt_bench.generation import sampling_settings
from finetune.mt_bench.questions import load_questions
from finetune.runs.cells import set_threads
from finetune.runs.chat import MERGED
from finetune.store import records
from finetune.training import memory
from finetune.training.loop import make_accelerator

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}

# What of a checkpoint's folder, besides weights, decides its answers.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


def model_id(config: Mapping[str, Any], seed: int) -> str:
    """FastChat's name of a model: the stem of its files."""
    return f"{config['model']['name']}-{config['method']['name']}-seed{seed}"


def answer_cell(config: Mapping[str, Any], seeds: Sequence[int], models_folder: Path, folder: Path) -> None:
    """All answers of a cell; writes ``<model_id>.jsonl``, its record ``<model_id>.json``, and ``cell.json``.

    Args:
        config: composed configuration; ``checkpoint``, with one seed, stands in for that seed's folder.
        seeds: of the trained checkpoints.
        models_folder: holds ``seed<seed>/`` each, as llama_train writes them.
        folder: for the files of this cell.

    Raises:
        ValueError: if the configuration is wrong, or any seed failed (after all others are done).
    """
    if config["checkpoint"] is not None and len(seeds) > 1:
        raise ValueError(f"checkpoint={config['checkpoint']} is one model, the seeds are {list(seeds)}: give one seed.")
    listed, failed = [], []
    for seed in tqdm(seeds, desc="seeds", disable=not config["progress"]):
        try:
            answer_one(config, seed, Path(config["checkpoint"] or models_folder / f"seed{seed}"), folder)
            listed.append(f"{model_id(config, seed)}.json")
        except ValueError as error:
            if len(seeds) == 1:
                raise
            failed.append(f"seed {seed}: {error}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(seeds)} seeds failed; " + "; ".join(failed))
    _keep_only(folder, listed)
    records.write_json(folder / "cell.json", {"records": listed})


def answer_one(config: Mapping[str, Any], seed: int, checkpoint: Path, folder: Path) -> Path:
    """The answers of one checkpoint and their record; a finished one of the same configuration is reused.

    Args:
        config: composed configuration.
        seed: with which the checkpoint was trained; in names and record.
        checkpoint: a merged model with its tokenizer.
        folder: for the two files.

    Returns:
        The record's path.

    Raises:
        ValueError: on a wrong configuration or checkpoint, and as :func:`finetune.mt_bench.answers.answer_questions`.
    """
    set_threads(config)
    options, dtype = _options(config["scale"]["answers"])
    template = chat_template(config["model"].get("template"))
    place = config["questions"]
    file = Path(place["root"]) / place["folder"] / place["questions"]
    questions = load_questions(file)
    header = _header(config, seed, checkpoint, file, len(questions), options, dtype)
    digest, name = header["run"]["config_hash"], model_id(config, seed)
    answers, path = folder / f"{name}.jsonl", folder / f"{name}.json"
    if path.exists() and answers.exists():
        record = records.read_json(path)
        if record["run"]["config_hash"] == digest and record["answers"]["sha256"] == _sha256(answers):
            log.info("%s is finished, reused", path)
            return path
    device = make_accelerator(config["device"], "fp32").device
    model, tokenizer = load_checkpoint(checkpoint, DTYPES[dtype])
    facts = answer_questions(
        model,
        tokenizer,
        template,
        questions,
        answers,
        options,
        model_id=name,
        digest=digest,
        device=device,
        progress_bar=config["progress"],
    )
    outcome = {
        "answers": {"file": answers.name, "sha256": _sha256(answers)},
        "sampling": sampling_settings(model),
        "precision": str(model.dtype).removeprefix("torch."),
        "device": memory.device_name(device),
        "provenance": records.provenance(),
    }
    records.write_json(path, header | facts | outcome)
    log.info("%s answers in %.0f s  %s", facts["counts"]["questions"], facts["seconds"], path)
    return path


def load_checkpoint(folder: Path, dtype: torch.dtype | str) -> tuple[nn.Module, Any]:
    """A merged checkpoint as ``from_pretrained`` reads it, and its tokenizer.

    Args:
        folder: with config.json, \\*.safetensors and the tokenizer's files.
        dtype: of the weights; ``auto`` takes the checkpoint's.

    Raises:
        ValueError: if something is missing or damaged, some weights included.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    tokenizer = models.load_tokenizer(_group(folder), "")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"no causal language model at {folder}: {first}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if found["missing_keys"]:  # from_pretrained would answer with random ones
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{folder} lacks {len(missing)} weights, the first {missing[0]}: run llama_train again.")
    return model, tokenizer


def _options(group: Mapping[str, Any]) -> tuple[AnswerOptions, str]:
    """``scale.answers``: the options, and the weights' data type, which is the loader's."""
    known = [field.name for field in fields(AnswerOptions)]
    unknown = set(group) - {*known, "dtype"}
    if unknown:
        raise ValueError(f"scale.answers has {sorted(unknown)}; allowed: {', '.join(known)}, dtype.")
    dtype = group.get("dtype", "fp32")
    if dtype not in DTYPES:
        raise ValueError(f"scale.answers.dtype={dtype!r}; allowed: {', '.join(DTYPES)}.")
    return AnswerOptions(**{name: value for name, value in group.items() if name != "dtype"}), dtype


def _header(
    config: Mapping[str, Any],
    seed: int,
    checkpoint: Path,
    file: Path,
    number: int,
    options: AnswerOptions,
    dtype: str,
) -> dict[str, Any]:
    """Who answers what, how; the hash is of all that decides the answers, so not of batch size, device and paths."""
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no model: run llama_train for seed {seed}, or give checkpoint=FOLDER.")
    _check_template(checkpoint, config["model"]["template"])
    settings = {name: _sha256(checkpoint / name) for name in SETTINGS if (checkpoint / name).is_file()}
    model = {"sha256": models.fingerprint(_group(checkpoint), ""), "settings": settings}
    questions = {"name": config["questions"]["name"], "file": file.name, "sha256": _sha256(file), "count": number}
    identity = {
        "version": config["version"],
        "kind": "answers",
        "model": model,
        "template": config["model"]["template"],
        "questions_sha256": questions["sha256"],
        "options": {name: value for name, value in asdict(options).items() if name != "batch_size"},
        "dtype": dtype,
    }
    run = {
        "experiment": config["name"],
        "kind": "answers",
        "model": config["model"]["name"],
        "method": config["method"]["name"],
        "task": "mt_bench",
        "seed": seed,
        "protocol": config.get("protocol", {}).get("name"),
        "scale": config["scale"]["name"],
        "config_hash": records.config_hash(identity),
    }
    return {
        "schema": records.SCHEMA,
        "version": config["version"],
        "status": "finished",
        "run": run,
        "options": asdict(options) | {"dtype": dtype},
        "template": config["model"]["template"],
        "model": {"title": config["model"]["title"], "checkpoint": str(checkpoint)} | model,
        "questions": questions,
    }


def _check_template(checkpoint: Path, name: str) -> None:
    """Refuse to ask a model in another template than it was trained with; a checkpoint from elsewhere does not say."""
    if (checkpoint / MERGED).is_file():
        trained = records.read_json(checkpoint / MERGED).get("template")
        if trained != name:
            raise ValueError(f"{checkpoint} was trained with template {trained!r}, model.template is {name!r}.")


def _group(checkpoint: Path) -> dict[str, Any]:
    """A folder as the ``model`` group that :mod:`finetune.models` reads."""
    return {"checkpoint": str(checkpoint), "folder": "", "revision": None, "random_weights": False}


def _keep_only(folder: Path, listed: Sequence[str]) -> None:
    """Move answers and records of other seeds aside: kept, but no longer the cell's."""
    stems = {Path(name).stem for name in listed}
    for path in (*folder.glob("*-seed*.jsonl"), *folder.glob("*-seed*.json")):
        if path.stem not in stems:
            (folder / "earlier").mkdir(exist_ok=True)
            shutil.move(path, folder / "earlier" / path.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
