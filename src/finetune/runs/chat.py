"""One run on dialogues: a decoder fine-tuned on OpenAssistant threads (paper, section 4.3), from inputs to record.

The GLUE runs' counterpart is :mod:`finetune.runs.glue`; training, checkpoints, tracking and records are the same code.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import models
from finetune.methods import Method, build_method, build_targets, needs_bases
from finetune.methods.base import count_parameters
from finetune.runs import record_content
from finetune.runs.chat_inputs import DTYPES, TASK, ChatInputs, hyperparameters, identity, training_options
from finetune.runs.execution import execute
from finetune.runs.glue import preliminary_options
from finetune.store import records
from finetune.training import memory
from finetune.training.evaluation import evaluate_causal
from finetune.training.gradients import Collected, collect
from finetune.training.loop import make_accelerator
from finetune.training.options import TrainingOptions, planned_steps
from finetune.training.refreshing import refresh_options

METRIC = "loss"
MERGED = "training.json"


def collect_gradients(inputs: ChatInputs, model: nn.Module, seed: int, device: torch.device) -> Collected:
    """The preliminary phase: moments of the gradients of SparseGrad's target matrices, in the training's precision."""
    protocol, scale = inputs.config["protocol"], inputs.config["scale"]
    targets = build_targets("sparsegrad", inputs.config["model"], protocol)
    bf16 = (scale["precision"] or protocol["precision"]) == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        collected = collect(
            model,
            inputs.splits["train"],
            targets,
            preliminary_options(inputs.config),
            seed=seed,
            device=device,
            progress_bar=inputs.config["progress"],
        )
    shared = [kind for kind in protocol["shared_input"] if kind in targets.target_modules]
    if len(shared) > 1:
        collected.share_input(shared)
    return collected


def load_for_gradients(inputs: ChatInputs, seed: int) -> nn.Module:
    """The starting model as the preliminary phase needs it: what is not differentiated in its storage precision."""
    config, model = inputs.config, inputs.load_model(seed)
    if config["scale"]["gradient_checkpointing"]:
        models.checkpoint_activations(model)
    if not config["protocol"]["preliminary"]["update"]:
        build_targets("sparsegrad", config["model"], config["protocol"]).set_trainable(model)
        models.cast_frozen(model, DTYPES[config["scale"]["frozen_dtype"]])
    return model


def chat_run(inputs: ChatInputs, seed: int, save_model: Path | None = None) -> dict[str, Any]:
    """Prepare, train and evaluate one model.

    Args:
        inputs: shared inputs of the cell.
        seed: of data order and of a method's initial weights.
        save_model: folder for the merged, plain model with the best weights and its tokenizer; None saves none.

    Returns:
        The record; ``score`` is the lowest validation loss, in nats a token. A run whose loss is not finite gives one
        with status ``failed``.

    Raises:
        ValueError: on bad configuration or data.
    """
    config, splits = inputs.config, inputs.splits
    digest = records.config_hash(identity(inputs, seed))
    precision = config["scale"]["precision"] or config["protocol"]["precision"]
    accelerator = make_accelerator(config["device"], precision)
    device = accelerator.device
    options = training_options(config, seed, accelerator.num_processes)
    options = replace(options, warmup_steps=min(options.warmup_steps, planned_steps(len(splits["train"]), options)))
    model = inputs.load_model(seed)
    one_backward = options.accumulation_steps == 1 and accelerator.num_processes == 1
    method, basis_facts = _method(inputs, model, seed, device, one_backward)
    parameters = count_parameters(model, method)
    model = _prepare(model, method, config["scale"], device, seed)
    optimizer = method.optimizer(model, options.learning_rate, options.weight_decay)

    def evaluate(m: nn.Module) -> dict[str, float]:
        with accelerator.autocast():
            return evaluate_causal(m, splits["validation"], options.evaluation_batch_size, device)

    record = record_content.header(
        config, inputs.fingerprint, splits, "validation", TASK, seed, hyperparameters(config), "llama", digest
    ) | {
        "treatment": _treatment(inputs, options, parameters["wrapped_layers"]),
        "parameters": parameters,
        "basis": basis_facts,
        "device": memory.device_name(device) | {"processes": accelerator.num_processes},
        "baseline": evaluate(model),
    }
    record["data"] |= {"facts": {role: split.facts for role, split in splits.items()}, "template": inputs.template.name}
    torch.manual_seed(seed)
    return execute(
        config,
        record,
        model,
        optimizer,
        splits["train"],
        evaluate,
        METRIC,
        options,
        accelerator,
        on_finished=None if save_model is None else lambda m: save_merged(inputs, method, m, save_model, digest),
        refresh=refresh_options(config["method"]),
    )


def _prepare(model: nn.Module, method: Method, scale: Mapping[str, Any], device: torch.device, seed: int) -> nn.Module:
    """The model as the method trains it: what is frozen in its storage precision, on the device."""
    if scale["gradient_checkpointing"]:
        models.checkpoint_activations(model)
    model.config.use_cache = False
    torch.manual_seed(seed)  # LoRA draws its weights
    model = method.prepare(model)
    models.cast_frozen(model, DTYPES[scale["frozen_dtype"]])
    return model.to(device)


def _method(
    inputs: ChatInputs, model: nn.Module, seed: int, device: torch.device, one_backward: bool
) -> tuple[Method, dict[str, Any]]:
    """The configured method; SparseGrad gets its bases from the file, or collects them here."""
    config, bases, facts = inputs.config, None, {}
    if needs_bases(config["method"]):
        if config["basis"] is not None:
            bases, facts = inputs.bases
        else:
            collected = collect_gradients(inputs, model, seed, device)
            bases, facts = collected.bases(), collected.facts
            model.to("cpu")
        facts = {name: value for name, value in facts.items() if name != "content"}
    parts = (config["method"], config["model"], config["protocol"])
    return build_method(*parts, bases=bases, one_backward_a_step=one_backward), facts


def _treatment(inputs: ChatInputs, options: TrainingOptions, matrices: int) -> dict[str, Any]:
    """What all methods must share, printed in the record."""
    scale = inputs.config["scale"]
    return {
        "packed_tokens": inputs.splits["train"].longest,
        "precision": options.precision,
        "frozen_dtype": scale["frozen_dtype"],
        "gradient_checkpointing": scale["gradient_checkpointing"],
        "optimizer": "AdamW",
        "schedule": options.schedule,
        "target_matrices": matrices,
        "train": inputs.config["protocol"]["train"],
        "max_steps": options.max_steps,
        "evaluation_steps": options.evaluation_steps,
    }


def save_merged(inputs: ChatInputs, method: Method, model: nn.Module, folder: Path, digest: str) -> None:
    """Write the merged model and its tokenizer, whole or not at all; ``from_pretrained`` and FastChat load them.

    Weights are stored in the precision of the frozen ones. ``training.json`` names run and chat template.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        plain = method.merge(model).to(DTYPES[inputs.config["scale"]["frozen_dtype"]])
        plain.config.use_cache = True
        with models.no_file_bars():
            plain.save_pretrained(temporary)
        inputs.tokenizer.save_pretrained(temporary)
        records.write_json(temporary / MERGED, {"config_hash": digest, "template": inputs.template.name})
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
