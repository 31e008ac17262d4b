"""What cells of answers and of judgments share: names, the loop over methods and seeds, parts of a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.runs.command import only_writer, read_lists
from finetune.store import records
from finetune.store.files import sha256


def model_id(config: Mapping[str, Any], seed: int) -> str:
    """FastChat's name of a model: the stem of its files."""
    return f"{config['model']['name']}-{config['method']['name']}-seed{seed}"


def work_of(config: Mapping[str, Any]) -> tuple[Path, list[str], list[int]]:
    """The root of the files, the methods and the seeds: those of a cell's lists, or by hand one method and seed."""
    if config["cell"] is None:
        return Path(config["output"]), [config["method"]["name"]], [config["seed"]]
    lists = read_lists(config["cell"], ["decoder_seeds", *([] if config["methods"] else ["methods"])])
    return Path("results") / config["name"], config["methods"] or lists["methods"], lists["decoder_seeds"]


def each(
    config: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    work: Callable[[Mapping[str, Any], int], None],
) -> None:
    """Do the seeds of every method; one that fails stops no other. Lists the records of each method in ``cell.json``.

    Args:
        config: composed configuration; its ``method`` is replaced by the name of each.
        folder: of the model; a method's files are in the folder of its name, which this process alone writes.
        work: of one method's configuration and one seed; writes ``<model_id>.json``.

    Raises:
        ValueError: if any failed, after all others are done. Subclasses of it come through at once.
    """
    failed = []
    for method in methods:
        own = {**config, "method": {"name": method}}
        with only_writer(folder / method, config["checkpoints"]):
            for seed in tqdm(seeds, desc=method, disable=not config["progress"]):
                try:
                    work(own, seed)
                except ValueError as error:
                    if type(error) is not ValueError:
                        raise
                    failed.append(f"{model_id(own, seed)}: {error}")
            there = [f"{model_id(own, seed)}.json" for seed in seeds]
            listed = [name for name in there if (folder / method / name).is_file()]
            records.write_json(folder / method / "cell.json", {"records": listed})
    if failed:
        raise ValueError(f"{len(failed)} of {len(methods) * len(seeds)} failed; " + "; ".join(failed))


def header(
    config: Mapping[str, Any], kind: str, seed: int, digest: str, file: Path, questions: Sequence[Any]
) -> dict[str, Any]:
    """The parts that a record of ``answers`` and one of ``judgments`` have alike; ``file`` is the questions'."""
    run = {
        "experiment": config["name"],
        "kind": kind,
        "model": config["model"]["name"],
        "method": config["method"]["name"],
        "task": "mt_bench",
        "seed": seed,
        "protocol": config["protocol"]["name"],
        "scale": config["scale"]["name"],
        "config_hash": digest,
    }
    asked = {"name": config["questions"]["name"], "file": file.name, "sha256": sha256(file), "count": len(questions)}
    return {"schema": records.SCHEMA, "version": config["version"], "run": run, "questions": asked}
