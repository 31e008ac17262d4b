"""What a less precise rotation costs and saves: selected entries, loss and step time on a real model's gradients.

    python -m finetune.efficiency.rotation --model outputs/rotation --examples outputs/rotation/stsb.safetensors \
        --output results/paper/rotation.json

The inputs are those of :mod:`finetune.efficiency.rotation_inputs`. The folded form is trained once with each precision
of the rotation, from one start, on the same batches and with the same dropout, in turns of a few steps. At some steps
all precisions, and float64, select from one gradient: that of the float32 model.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import models
from finetune.efficiency.rotation_inputs import read_examples, read_model
from finetune.efficiency.rotation_table import GRADIENT, HEAD, REFERENCE, table_rows
from finetune.efficiency.rotation_trial import LAST, ROTATIONS, TURN, repetition
from finetune.efficiency.stage import Stage
from finetune.efficiency.variants import PRECISIONS
from finetune.store import records
from finetune.store.boundary import exit_with_message
from finetune.store.places import only_writer

log = logging.getLogger("finetune.efficiency")

ONLY_CUDA = {"tf32": "TF32 exists on CUDA alone: a CPU multiplies in float32"}


@dataclass(frozen=True)
class RotationOptions:
    """How to measure.

    Attributes:
        steps: of training.
        batch_size: rows of a step, and of a gradient that the bases are made from.
        learning_rate: constant.
        density: share of a matrix' entries that is selected.
        gradients: batches that the bases are made from.
        precisions: of training, ``fp32`` or ``bf16`` autocast.
        seeds: of head, order and dropout; each is one repetition.
        rotations: of :data:`finetune.efficiency.rotation_trial.ROTATIONS`, float32 among them; None takes all that the
            device has.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: of torch on the CPU; None leaves torch's choice.

    Raises:
        ValueError: if a value is out of range.
    """

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 1e-4
    density: float = 0.01
    gradients: int = 30
    precisions: Sequence[str] = ("bf16",)
    seeds: Sequence[int] = (1, 2)
    rotations: Sequence[str] | None = None
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradients"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1.")
        allowed = {"precisions": PRECISIONS, "seeds": self.seeds, "rotations": ROTATIONS}
        for name, known in allowed.items():
            given = ROTATIONS if getattr(self, name) is None else getattr(self, name)
            if not given or len(set(given)) < len(given) or not set(given) <= set(known):
                raise ValueError(f"{name}={list(given)}; one or more, each once, of: {', '.join(map(str, known))}.")
        if self.rotations is not None and REFERENCE not in self.rotations:
            raise ValueError(f"rotations={list(self.rotations)}; {REFERENCE} must be there: others are compared to it.")

    @property
    def looks(self) -> list[int]:
        """Steps taken before each comparison of what is selected."""
        return sorted({0, self.steps // 4, self.steps // 2, self.steps})

    def on(self, device: torch.device) -> list[str]:
        """The rotations to measure there.

        Raises:
            ValueError: if one is asked for that the device has not.
        """
        there = [name for name in ROTATIONS if device.type == "cuda" or name not in ONLY_CUDA]
        if missing := [name for name in self.rotations or () if name not in there]:
            raise ValueError(f"rotations: {ONLY_CUDA[missing[0]]}; leave {missing[0]} out, or use device=cuda.")
        return [name for name in there if self.rotations is None or name in self.rotations]


def measure_rotation(
    model: str | Path, examples: Sequence[str | Path], options: RotationOptions, stage: Stage
) -> dict[str, Any]:
    """Measure all tasks, precisions of training and seeds, and write the record, or read it where it is finished.

    Args:
        model: a prepared folder.
        examples: prepared files, one a task.

    Raises:
        ValueError: if the device or an input is missing, damaged or given twice.
    """
    group, tasks = read_model(model), [read_examples(path) for path in examples]
    if len({task.name for task, _ in tasks}) < len(tasks):
        raise ValueError(f"examples of {', '.join(task.name for task, _ in tasks)}: one file a task.")
    where = {"targets": group["target_modules"], "blocks": group["layers_to_transform"]}
    same = ("steps", "looks", "batch_size", "gradients", "density", "learning_rate")

    def measure(device: torch.device, folder: Path) -> dict[str, Any]:
        rotations, entries = options.on(device), []
        for task, splits, precision, seed in _each(tasks, options):
            entry = {"task": task.name, "metric": task.metric, "precision": precision, "seed": seed}
            kept = folder / f"{task.name}-{precision}-{seed}.json"
            if not kept.is_file():
                log.info("%s, %s, seed %d", task.name, precision, seed)
                plain = models.load_classifier(group, "", task.num_labels, seed).to(device)
                how = {name: getattr(options, name) for name in same} | {"precision": precision, "seed": seed}
                records.write_json(kept, entry | repetition(plain, task, splits, **where, rotations=rotations, **how))
            entries.append(records.read_json(kept))
        left_out = {name: why for name, why in ONLY_CUDA.items() if name not in rotations and device.type != "cuda"}
        return {"treatment": treatment | {"left_out": left_out}, "entries": entries}

    treatment = asdict(options) | {
        "looks": options.looks,
        "form": "folded",
        "optimizer": "AdamW; lazy Adam for the matrices; everything trains",
        "bases": "HOSVD of the gradients, without autocast, of the first batches at the start",
        "order": f"{TURN} steps of each rotation in turn, every second time in reverse; the same batches and dropout",
        "agree": "share of a matrix' selected entries that V G U^T in float64 selects too; mean and least over layers",
        "energy": "sum of squares of the selected entries of V G U^T in float64, over that of its own selection",
        GRADIENT: "V G U^T in float64 of the gradient under autocast, against that without; no dropout in either",
        "loss": f"mean over the last {LAST} steps",
    }
    content = {
        "model": where | models.contents(group, ""),
        "tasks": {task.name: {role: split.content for role, split in found.items()} for task, found in tasks},
        "options": asdict(options),
        "threads": options.threads or torch.get_num_threads(),
    }
    stage = replace(stage, kind="rotation", named={"model": group["name"]})
    return stage.run(content, measure, device=options.device, threads=options.threads)


def _each(tasks: Sequence[tuple[Any, Any]], options: RotationOptions) -> Iterator[tuple[Any, Any, str, int]]:
    for task, splits in tasks:
        for precision in options.precisions:
            for seed in options.seeds:
                yield task, splits, precision, seed


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the record.

    Raises:
        SystemExit: with one line of explanation, if an argument or a file is refused.
    """
    given = vars(_parser().parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_with_message():
        model, examples, path = given.pop("model"), given.pop("examples"), Path(given.pop("output"))
        stage = Stage(path)
        with only_writer(path.parent, stage.checkpoints, name=path.name):
            record = measure_rotation(model, examples, RotationOptions(**given), stage)
        for row in (HEAD, *table_rows(record)):
            log.info("%s", " | ".join(row))
        log.info("%s", path)


def _parser() -> argparse.ArgumentParser:
    own = RotationOptions()
    parser = argparse.ArgumentParser(prog="python -m finetune.efficiency.rotation", description=__doc__)
    parser.add_argument("--model", required=True, help="folder that finetune.efficiency.rotation_inputs wrote")
    parser.add_argument("--examples", required=True, nargs="+", help="its files of tasks")
    parser.add_argument("--output", required=True, help="the record's file")
    parser.add_argument("--steps", type=int, default=own.steps, help=f"of training (default: {own.steps})")
    parser.add_argument("--learning-rate", type=float, default=own.learning_rate)
    parser.add_argument("--precisions", nargs="+", default=own.precisions, help=", ".join(PRECISIONS))
    parser.add_argument("--rotations", nargs="+", help=f"default: all that the device has of {', '.join(ROTATIONS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=own.seeds)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=own.device)
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    return parser


if __name__ == "__main__":
    main()
