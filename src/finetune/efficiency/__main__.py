"""python -m finetune.efficiency: measure all variants of a model on token lengths that are given."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.efficiency.lengths import PADDINGS, read_lengths, rows_of
from finetune.efficiency.stage import Stage
from finetune.efficiency.task import EfficiencyOptions, measure_task
from finetune.efficiency.variant_memory import KEEPS
from finetune.efficiency.variants import PRECISIONS, VARIANTS
from finetune.store.boundary import exit_with_message
from finetune.store.files import read_yaml
from finetune.store.places import only_writer
from finetune.training.capture import MODES

log = logging.getLogger("finetune.efficiency")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``<output>/<task>.json`` for every lengths file.

    Raises:
        SystemExit: with one line of explanation, if an argument or a file is refused.
    """
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_with_message(), _keys_named():
        model, protocol = (read_yaml(Path(path)) for path in (given.model, given.protocol))
        tasks = [read_lengths(path) for path in given.lengths or ()]
        tasks += [rows_of(given.batch_size, given.tokens)] if given.tokens else []
        names = [lengths.task for lengths in tasks]
        if len(set(names)) < len(names) or not tasks:
            raise ValueError(f"--lengths are of the tasks {', '.join(names) or 'none'}; one file a task, or --tokens.")
        if given.vocabulary is not None:
            model["architecture"] = model.get("architecture", {}) | {"vocab_size": given.vocabulary}
        own = ("batch_size", "batches", "rounds", "warmup_steps", "variants", "keep", "device", "threads", "seed")
        own = (*own, "graphs", "checkpointing")
        protocol = {"padding": "longest"} | protocol  # a decoder's rows are full
        asked: dict[str, Any] = {name: getattr(given, name) for name in own}
        for name in ("padding", "max_length", "precision"):
            asked[name] = getattr(given, name) or protocol[name]
        options = EfficiencyOptions(**asked)
        for lengths in tasks:
            path = Path(given.output) / f"{lengths.task}.json"
            stage = Stage(path, experiment=given.experiment, scale=given.scale)
            with only_writer(path.parent, stage.checkpoints, name=path.name):
                record = measure_task(model, protocol, lengths, options, stage)
            for line in summary(record):
                log.info("%s", line)
            log.info("%s", path)


@contextmanager
def _keys_named() -> Iterator[None]:
    """A model's or protocol's file by hand may lack a key."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"a configuration has no {error}") from None


def summary(record: Mapping[str, Any]) -> list[str]:
    """The record in a few lines: steps per second, ratio to full fine-tuning, peaks in MB."""
    device, run = record["device"], record["run"]
    lines = [f"{run['model']} {run['task']} on {device['name']} ({device['type']}, {device['threads']} threads)"]
    lines += [f"warning: {warning}" for warning in record["warnings"]]
    lines.append(f"{'':<24}{'steps/s':>9}{'/ full':>8}{'training MB':>13}{'evaluation MB':>15}{'predicted':>11}")
    for entry in record["variants"]:
        if entry["status"] != "finished":
            lines.append(f"{entry['name']:<24}{entry['status']}: {entry['reason']}")
            continue
        memory = entry["memory"]
        ratio = f"{entry['ratio_to_full']['mean']:.3f}" if "ratio_to_full" in entry else ""
        predicted = memory.get("predicted_over_measured", {}).get("peak_training")
        lines.append(
            f"{entry['name']:<24}{entry['steps_per_second']:>9.3f}{ratio:>8}{memory['peak_training'] / 1e6:>13.1f}"
            f"{memory['peak_evaluation'] / 1e6:>15.1f}{'' if predicted is None else f'{predicted:.3f}':>11}"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune.efficiency", description=__doc__)
    parser.add_argument("--model", required=True, help="a model's YAML file, such as conf/model/roberta_base.yaml")
    parser.add_argument("--protocol", required=True, help="a protocol's, such as conf/protocol/printed.yaml")
    parser.add_argument("--lengths", nargs="+", help="JSON files of token lengths, one a task")
    parser.add_argument("--tokens", type=int, help="rows of so many tokens, for a decoder")
    parser.add_argument("--output", required=True, help="folder for <task>.json")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a step (default: 32)")
    parser.add_argument("--batches", type=int, default=8, help="different batches of a round (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all variants (default: 5)")
    parser.add_argument(
        "--warmup", dest="warmup_steps", type=int, default=8, help="untimed steps of a fresh variant (default: 8)"
    )
    parser.add_argument("--padding", choices=PADDINGS, help="default: the protocol's")
    parser.add_argument("--max-length", type=int, help="default: the protocol's")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="default: the protocol's")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=", ".join(variant.name for variant in VARIANTS))
    parser.add_argument("--graphs", choices=MODES, default="off", help="run passes from CUDA graphs")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of every block")
    parser.add_argument("--keep", choices=KEEPS, default="auto", help="variants in memory between rounds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--vocabulary", type=int, help="tokens, where the model's file names none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experiment", default="hand", help="name for the record")
    parser.add_argument("--scale", default="hand", help="name for the record")
    return parser


if __name__ == "__main__":
    main()
