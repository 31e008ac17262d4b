"""The efficiency stage of one model: the real lengths of every task of an experiment, measured and recorded.

The one module here that reads data and needs the pipeline's packages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import models
from finetune.efficiency.lengths import Lengths
from finetune.efficiency.stage import Stage
from finetune.efficiency.task import EfficiencyOptions, measure_task
from finetune.store import records
from finetune.tracking.results import send_efficiency


def efficiency_cell(config: Mapping[str, Any], tasks: Sequence[str], folder: Path) -> None:
    """Measure a model on every task; ``<task>.json`` each. A finished record of this machine is not measured again.

    Args:
        config: composed from ``conf/efficiency.yaml``.
        tasks: names.
        folder: for the records; those of other tasks are deleted.

    Raises:
        ValueError: if a task, the tokenizer or the device is missing, or an option is refused.
    """
    tokenizer = models.load_tokenizer(config["model"], config["data"]["root"])
    model = dict(config["model"])
    # The smoke models have no vocabulary until their tokenizer is trained.
    model["architecture"] = {"vocab_size": len(tokenizer), **model["architecture"]}
    for task in tasks:
        lengths, labels = _lengths(config, task, tokenizer)
        options = _options(config, labels)
        named = {"experiment": config["name"], "scale": config["scale"]["name"], "version": config["version"]}
        record = measure_task(model, config["protocol"], lengths, options, Stage(folder / f"{task}.json", **named))
        send_efficiency(record, config["wandb"])
    for path in folder.glob("*.json"):
        if path.stem not in tasks:
            path.unlink()


def write_lengths(config: Mapping[str, Any], tasks: Sequence[str], folder: Path) -> None:
    """Write ``<task>.json``, the lengths file of every task, for ``python -m finetune.efficiency``."""
    tokenizer = models.load_tokenizer(config["model"], config["data"]["root"])
    for task in tasks:
        records.write_json(folder / f"{task}.json", _lengths(config, task, tokenizer)[0].content())


def _lengths(config: Mapping[str, Any], task: str, tokenizer: Any) -> tuple[Lengths, int]:
    """Lengths of the tokenised training split, and the number of labels."""
    from finetune.data.glue import load_task

    how = {name: config["protocol"][name] for name in ("max_length", "padding")} | {"limit": config["scale"]["rows"]}
    facts, splits = load_task(dict(config["data"]) | {"task": task}, tokenizer, **how)
    split = splits["train"]
    rows = "whole" if how["limit"] is None else f"first {len(split)} rows of the"
    source = f"{config['data']['name']} {task}, {rows} training split (sha256 {split.sha256}), model's own tokenizer"
    return Lengths(task, source, tuple(len(row) for row in split.input_ids)), facts.num_labels


def _options(config: Mapping[str, Any], num_labels: int) -> EfficiencyOptions:
    scale, protocol = config["scale"], config["protocol"]
    return EfficiencyOptions(
        batch_size=config["batch_size"] or scale["batch_size"],
        precision=scale["precision"] or protocol["precision"],
        num_labels=num_labels,
        **{name: scale[name] for name in ("batches", "rounds", "warmup_steps", "keep")},
        **{name: protocol[name] for name in ("padding", "max_length")},
        **{name: config[name] for name in ("variants", "device", "threads", "seed")},
    )
