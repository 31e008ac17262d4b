"""What the figures of gradients are drawn from: the energy stage's records and heat maps, and the words they share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from finetune.report.figures.figure_style import COLOURS, GREY, Mark
from finetune.store import records
from finetune.store.files import sha256

if TYPE_CHECKING:
    import numpy as np


SPACES = {
    "original": Mark("original space", COLOURS["meprop"], "o"),  # where MeProp selects
    "random": Mark("random bases", GREY, "x"),
    "released": Mark("released orientation, V G U", COLOURS["rotated"], "v"),
    "stored": Mark("HOSVD core, basis of another head", COLOURS["lora"], "s"),
    "initial": Mark("HOSVD core, own basis of the first step", COLOURS["sparsegrad"], "D"),
    "refreshed": Mark("HOSVD core, own basis, refreshed", COLOURS["truncated"], "^"),
}
"""How each space of :mod:`finetune.energy.spaces` is drawn."""

ANOTHER_HEAD = (
    "Basis of another head: that of the basis stage, which all runs of a task share; it was made from the same weights "
    "under a classification head of another seed. Own basis: made from this run's weights and head."
)

TRAJECTORIES = {"full": "full fine-tuning", "sparsegrad": "SparseGrad"}
PAPER_MODEL = "bert_base"

KEPT = 0.01
"""The paper's share of entries (D1)."""


@dataclass(frozen=True)
class Look:
    """One trajectory of one task: the record of :mod:`finetune.energy.cell`, and its path."""

    path: Path
    record: Mapping[str, Any]

    @property
    def task(self) -> str:
        return self.record["titles"]["task"]

    @property
    def trajectory(self) -> str:
        name = self.record["run"]["trajectory"]
        return TRAJECTORIES.get(name, name)

    @property
    def steps(self) -> list[int]:
        return [step["step"] for step in self.record["steps"]]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(layer["kind"] for layer in self.record["layers"]))

    def blocks(self, kind: str) -> dict[int, int]:
        """Block -> place of its layer of a kind in the record's lists, rising."""
        layers = enumerate(self.record["layers"])
        return dict(sorted((layer["layer"], place) for place, layer in layers if layer["kind"] == kind))

    def shape(self, kind: str, block: int) -> tuple[int, int]:
        """Rows and columns of a layer's weight."""
        rows, columns = self.record["layers"][self.blocks(kind)[block]]["shape"]
        return rows, columns

    def values(self, step: int, space: str, kind: str, name: str) -> list[float]:
        """A number of every block's layer of a kind; the energy is that of the largest entries, `KEPT` of all.

        Raises:
            ValueError: if the energy of this share was not measured.
        """
        found = [self.record["steps"][step]["spaces"][space][place][name] for place in self.blocks(kind).values()]
        if name != "energy":
            return found
        shares = self.record["measure"]["shares"]
        if KEPT not in shares:
            raise ValueError(f"{self.path}: no energy of the largest {KEPT:.2%} of the entries; measured: {shares}.")
        return [values[shares.index(KEPT)] for values in found]

    def maps(self) -> dict[str, np.ndarray]:
        """The heat maps beside the record, float32, by name; read without torch.

        Raises:
            ValueError: if their file is missing, damaged or of another configuration.
        """
        path = self.path.with_suffix(".safetensors")
        if not path.is_file():
            raise ValueError(f"{path} does not exist: run the energy stage.")
        if self.record.get("maps_sha256") not in (None, sha256(path)):  # None: records without it
            raise ValueError(f"{path} is another file than was written with {self.path}: run the energy stage again.")
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get("sparsegrad", "{}"))
                found = {name: file.get_tensor(name).astype("float32") for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): move it away and run the energy stage again.") from None
        if facts.get("config_hash") != self.record["run"]["config_hash"]:
            raise ValueError(f"{path} is of another configuration than {self.path}: run the energy stage again.")
        return found


def read_looks(folder: Path, tasks: Sequence[str]) -> list[Look]:
    """The trajectories of a model, in the order of the tasks.

    Raises:
        ValueError: if there is none.
    """
    found = [Look(path, records.read_record(path)) for path in sorted(folder.glob("*.json"))]
    found = [look for look in found if look.record["run"]["task"] in tasks]
    if not found:
        raise ValueError(f"{folder} holds no record of {', '.join(tasks)}: run the energy stage.")
    return sorted(found, key=lambda look: tasks.index(look.record["run"]["task"]))


def fully_tuned(looks: Sequence[Look]) -> Look:
    """The first task's trajectory of full fine-tuning, else its first."""
    first = [look for look in looks if look.task == looks[0].task]
    return next((look for look in first if look.record["run"]["trajectory"] == "full"), first[0])


def of_model(look: Look, model: str) -> str:
    """A sentence: which model it is, and that it is not the paper's where it is not."""
    title = look.record["titles"]["model"]
    if model == PAPER_MODEL:
        return f"Model: {title}."
    return f"{title} stands in BERT's place: it is no BERT, and its numbers are not the paper's."


def setting(look: Look) -> str:
    """How the gradients came about, for a caption."""
    training, measured = look.record["training"], look.record["measure"]
    batch = training["batch_size"]
    return (
        f"{look.record['titles']['model']}, learning rate {training['learning_rate']:g}, batches of {batch}; gradients "
        f"in float32 on {measured['judged_examples'] // batch} training batches that no basis was made from"
    )


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over blocks, such as ``0.72 ± 0.22``."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
