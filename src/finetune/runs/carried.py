"""The runs of a carried folder, on a machine without Hydra, DVC, pydantic, datasets and optuna.

    python -m finetune.runs.carried FOLDER --weights ROOT [--minutes 9]

The folder is :mod:`finetune.runs.carry`'s; its ``results`` are written as a stage writes them, and travel back by
``python -m finetune.store.pack FOLDER ARCHIVE``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune import models
from finetune.runs.cells import Cell, make_problem
from finetune.runs.grid import is_grid
from finetune.runs.search_space import SearchSpace
from finetune.runs.slices import run_slice
from finetune.store.boundary import exit_with_message
from finetune.store.files import sha256
from finetune.store.pack import CARRIED, carried_origin
from finetune.store.records import read_json

log = logging.getLogger("finetune.runs.carried")


def carried_cells(folder: Path, weights: Path) -> list[Cell]:
    """The cells of a carried folder.

    Args:
        folder: the folder.
        weights: where the checkpoints lie, laid out as ``data.root`` is.

    Raises:
        ValueError: if something is missing, damaged, or other weights than those that were carried for.
    """
    content = read_json(folder / CARRIED)
    for name, digest in content["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is missing, or another than was written: copy the folder again.")
    for model, wanted in content["weights"].items():
        _check_weights(model, wanted, weights)
    origin, loads = carried_origin(folder), {}
    return [_cell(entry, folder, weights, origin, loads) for entry in content["cells"]]


def _check_weights(model: str, wanted: Mapping[str, str], weights: Path) -> None:
    place = weights / wanted["folder"]
    if not place.is_dir():
        raise ValueError(f"the weights of {model} are not at {place}: copy them there, or give another --weights.")
    group = {"checkpoint": str(place), "folder": wanted["folder"], "revision": None, "random_weights": False}
    found = models.contents(group, weights)
    if other := [name for name, value in found.items() if wanted.get(name) != value]:
        raise ValueError(f"{place} holds other weights of {model} than the experiment's (by {other[0]}): copy those.")


def _cell(
    entry: Mapping[str, Any], folder: Path, weights: Path, origin: Mapping[str, Any], loads: dict[str, Any]
) -> Cell:
    config = dict(entry["config"])
    group = "chat" if config["problem"] == "chat" else "data"
    config[group] = config[group] | {"root": str(weights)}
    carried = config["carried"]
    splits = {
        task: {role: str(folder / name) for role, name in split.items()} for task, split in carried["splits"].items()
    }
    config |= {
        "carried": {**carried, "splits": splits},
        "commit": origin["commit"],
        "checkpoints": str(folder / "checkpoints"),
        "basis": config["basis"] and str(folder / "basis" / config["model"]["name"]),
        "wandb": config["wandb"] | {"mode": "disabled"},
    }
    return Cell(make_problem(config, loads), entry["tasks"], entry["seeds"], folder / "results" / config["name"])


def check_searches(cells: list[Cell]) -> None:
    """Refuse a search that samples where there is no optuna: its record travels instead. A grid needs none.

    Raises:
        ValueError: naming a record that is missing.
    """
    if find_spec("optuna") is not None:
        return
    sampled = [one for one in cells if one.problem.searches and not is_grid(SearchSpace.of(one.problem.config))]
    paths = [cell.folder("search") / f"{task}.json" for cell in sampled for task in cell.tasks]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"{len(missing)} searches that sample are missing, such as {missing[0]}, and optuna is not installed here: "
            "search where it is, and carry again, or install it."
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="written by finetune.runs.carry")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the checkpoints, as data.root")
    parser.add_argument("--minutes", type=float, help="when to end; none: when all is done")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    with exit_with_message():
        cells = carried_cells(given.folder, given.weights)
        check_searches(cells)
        outcome = run_slice(cells, None if given.minutes is None else time.time() + 60 * given.minutes)
        failed = len(outcome.failed())
        log.info("%d of %d runs are done, %d failed", len(outcome.found) - failed, len(outcome.works), failed)
        if not outcome.over:
            outcome.check()


if __name__ == "__main__":
    main()
