"""Carry an experiment's records from identities of 2026-11 to those of today; no number changes, nothing is run again.

python experiments/migrate_results.py local --basis results/local/basis

Until then a run's hash took the model for its weights and the data for their files. Now it holds the content of
config.json, the token ids and the bases, and every record a checksum. A record goes on only if its old hash is that of
its own content. Whatever the new identity holds is read from the files at hand, and those are held against the record:
its sums of weights and data, the model's published checksums, the losses of its preliminary phase and of its starting
model. What nothing in a record tells is listed as unchecked, there and in MIGRATION.md. A rerun goes on.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tqdm import tqdm

from finetune import models
from finetune.energy.cell import identity as energy_identity
from finetune.methods import deciding
from finetune.runs.cells import PROBLEMS
from finetune.runs.problem import Problem, Run, for_task
from finetune.runs.search import SearchSpace, is_told_by
from finetune.store import records
from finetune.store.files import write_atomically
from finetune.training.processes import make_accelerator
from sparsegrad import load_tensors, save_tensors

CONF = Path(__file__).parents[1] / "conf"
PLACES = ("checkpoint", "folder", "files", "title", "checksums", "tokenizer")
SIZES = {
    "train": ("train_examples", "epochs", "max_steps", "evaluation_steps", "accumulation_steps", "precision"),
    "llama": (
        *("train_examples", "epochs", "max_steps", "warmup_steps", "evaluation_steps", "micro_batch_size"),
        *("precision", "frozen_dtype", "max_length"),
    ),
}
CHOICES = ("languages", "threads", "deleted", "review", "validation_share")
SEALED = "hosvd_cost.json", "cost_curves.json", "efficiency/*/*.json", "mt_bench/*/*/*/*.json"
"""Records whose identity stays; they get their checksum."""

HEAD = """# Migration of records

Written by `experiments/migrate_results.py`, which says what changed. No number was changed, no run repeated: the files
are of the same runs under the hashes of today. `migration` in each record holds its old hash and what was checked.

"""


class Refused(ValueError):
    """A record, or a file at hand, is not what it should be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--basis", type=Path, required=True, help="folder of <model>/<task>.safetensors, made anew")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        Migration(Path("results") / args.experiment, args.basis).run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


class Migration:
    """All records of an experiment."""

    def __init__(self, results: Path, basis: Path) -> None:
        self.results, self.basis = results, basis
        self.said: Counter[tuple[str, str]] = Counter()
        self.runs: dict[tuple[str, str, str], dict[str, Any]] = {}  # one a cell's task, for its search

    def run(self) -> None:
        cells = sorted(self.results.glob("runs/*/*/cell.json"))
        for index in tqdm(cells, desc="cells"):
            records.write_json(index, {"records": [self._run(path) for path in self._of_cell(index)]})
        for pattern, carry in (("search/*/*/*.json", self._search), ("energy/*/*.json", self._energy)):
            for path in sorted(self.results.glob(pattern)):
                carry(path)
        for path in [path for pattern in SEALED for path in sorted(self.results.glob(pattern))]:
            if path.name != "cell.json":
                self._seal(path)
        lines = [f"- {kind}, {what}: {count} records" for (kind, what), count in sorted(self.said.items())]
        write_atomically(self.results / "MIGRATION.md", HEAD + "\n".join(lines) + "\n")

    def _of_cell(self, index: Path) -> list[Path]:
        """The records of a cell, those that a killed migration has renamed too."""
        return sorted(index.parent.glob("*-seed*-*.json"))

    def _run(self, path: Path) -> str:
        record = records.read_json(path)
        run = record["run"]
        if self._is_done(path, record):
            self.runs[run["model"], run["method"], run["task"]] = record
            return path.name
        _same(path, run["config_hash"], records.config_hash(first_identity(record)), "hash of its content")
        _same(path, path.stem, f"{run['task']}-seed{run['seed']}-{run['config_hash']}", "name")
        problem = self._problem(record)
        checked, unchecked = self._check(path, record, problem)
        self.runs[run["model"], run["method"], run["task"]] = record
        identity = problem.identity(Run(run["task"], run["seed"], record["hyperparameters"]))
        digest = records.config_hash(identity)
        splits = problem.splits(run["task"])
        parts = {
            "run": run | {"config_hash": digest},
            "model": record["model"] | problem.contents,
            "data": record["data"] | {"content": {role: split.content for role, split in splits.items()}},
            "basis": record["basis"] | ({"sha256": identity["basis"]["sha256"]} if "task" in record["basis"] else {}),
        }
        target = path.with_name(f"{run['task']}-seed{run['seed']}-{digest}.json")
        self._write(target, _with_identity(record, identity) | parts, run, checked, unchecked)
        if target != path:
            path.unlink()
        return target.name

    def _problem(self, record: Mapping[str, Any]) -> Problem:
        """The run's problem, on the files at hand."""
        decoder, model = record["run"]["kind"] == "llama", record["run"]["model"]
        folder = str(self.basis / model) if "task" in record["basis"] else None
        held = record["config"] | {"version": record["version"], "basis": folder, "device": "cpu", "progress": False}
        return PROBLEMS["chat" if decoder else "glue"](composed("chat" if decoder else "glue") | held)

    def _check(self, path: Path, record: Mapping[str, Any], problem: Problem) -> tuple[list[str], list[str]]:
        """Hold the files at hand against the record: what agrees, and what nothing tells."""
        task, checked, unchecked = record["run"]["task"], ["hash", "weights", "data"], []
        _same(path, record["model"]["sha256"], problem.contents["sha256"], "sum of the weights")
        for role, split in problem.splits(task).items():
            _same(path, record["data"]["sha256"][role], split.sha256, f"sum of the {role} data")
            _same(path, record["data"]["rows"][role], len(split), f"rows of the {role} data")
        published = record["config"]["model"].get("checksums", {})
        for name, value in published.items():
            _same(path, value, file_sum(Path(models.resolve(record["config"]["model"], problem.root)[0]) / name), name)
        if "baseline" in record:
            _same(path, record["baseline"]["loss"], self._baseline(problem, record), "loss of the starting model")
            checked += ["configuration and tokenizer (loss of the starting model)"]
        elif published:
            checked += ["configuration and tokenizer (published checksums)"]
        else:
            unchecked += ["configuration", "tokenizer"]
        if "task" in record["basis"]:
            _, facts = problem.bases(task)
            for name in ("loss_first", "loss_last", "gradients", "seed"):
                _same(path, record["basis"][name], facts[name], f"{name} of the preliminary phase")
            checked += ["bases (made anew: the losses of their preliminary phase)"]
        return checked, unchecked

    def _baseline(self, problem: Problem, record: Mapping[str, Any]) -> float:
        key = record["run"]["model"], record["treatment"]["packed_tokens"], record["treatment"]["precision"]
        if key not in _LOSSES:
            run = Run(record["run"]["task"], record["run"]["seed"], record["hyperparameters"])
            accelerator = make_accelerator("cpu", problem.precision)
            model = problem.load_model(run.task, run.seed)
            _LOSSES[key] = problem.evaluator(run.task, problem.options(run, 1), accelerator)(model)["loss"]
        return _LOSSES[key]

    def _search(self, path: Path) -> None:
        record, journal = records.read_json(path), path.with_suffix(".journal")
        if self._is_done(path, record):
            return
        run = record["run"]
        held = self.runs[run["model"], run["method"], run["task"]]
        problem, old = self._problem(held), run["config_hash"]
        steps = for_task(problem.config["scale"]["search"]["max_steps"], run["task"])
        whole = Run(run["task"], record["seed"], {"max_steps": steps}, search=True)
        first = first_identity(held | {"hyperparameters": whole.hyperparameters})
        del first["scale"]["max_steps"]
        _same(path, old, records.config_hash(first | {"kind": "search", "seed": whole.seed}), "hash of its cell")
        if not is_told_by(journal, old, SearchSpace.of(problem.config), record):
            raise Refused(f"{path} differs from its journal.")
        identity = problem.identity(whole)
        digest = records.config_hash(identity)
        write_atomically(journal, journal.read_text().replace(f'"{old}"', f'"{digest}"'))
        parts = {"run": run | {"config_hash": digest}}
        self._write(path, _with_identity(record, identity) | parts, run, ["hash", "journal"], [])

    def _energy(self, path: Path) -> None:
        record = records.read_json(path)
        if self._is_done(path, record):
            return
        run = record["run"]
        names = [f"{name}={run[name]}" for name in ("model", "protocol")]
        config = composed("energy", *names, f"scale=energy/{run['scale']}") | {"device": "cpu", "progress": False}
        problem = PROBLEMS["glue"](config | {"version": record["version"], "basis": str(self.basis / run["model"])})
        task, trajectory, old = run["task"], run["trajectory"], run["config_hash"]
        identity, (_, facts) = energy_identity(problem, task, trajectory), problem.bases(task)
        data = {role: split.sha256 for role, split in problem.splits(task).items()}
        model = {name: value for name, value in identity["model"].items() if not name.endswith("sha256")}
        protocol = ("density", "train", "frozen", "padding", "max_length", "weight_decay", "max_grad_norm", "schedule")
        preliminary = problem.config["protocol"]["preliminary"]
        first = {name: identity[name] for name in ("version", "method", "scale", "measure", "seed")} | {
            "model": model, "model_sha256": problem.contents["sha256"], "task": task, "data_sha256": data,
            "protocol": {name: problem.config["protocol"][name] for name in protocol}, "preliminary": preliminary,
            "basis": {"gradients": facts["gradients"], "data_sha256": data["train"], "preliminary": preliminary},
        }  # fmt: skip
        _same(path, old, records.config_hash(first), "hash of today's configuration and of the files at hand")
        digest = records.config_hash(identity)
        tensors, facts = load_tensors(path.with_suffix(".safetensors"))
        _same(path, old, facts["config_hash"], "hash in its maps")
        save_tensors(path.with_suffix(".safetensors"), tensors, facts | {"config_hash": digest})
        parts = {"run": run | {"config_hash": digest}}
        unchecked = ["bases (no number of the record tells)"]
        self._write(path, _with_identity(record, identity) | parts, run, ["hash", "weights", "data"], unchecked)

    def _seal(self, path: Path) -> None:
        record = records.read_json(path)
        records.write_record(path, record)
        self.said[record["run"]["kind"], "hash as it was; checksum added"] += 1

    def _write(
        self, path: Path, record: Mapping[str, Any], old: Mapping[str, Any], checked: list[str], unchecked: list[str]
    ) -> None:
        told = {"config_hash": old["config_hash"], "checked": checked, "unchecked": unchecked}
        records.write_record(path, {**record, "migration": told})
        self._is_done(path, records.read_json(path))

    def _is_done(self, path: Path, record: Mapping[str, Any]) -> bool:
        """Whether a record is carried over; it is checked then, and counted."""
        if "migration" not in record:
            return False
        records.check_record(path, record)
        for how in ("checked", "unchecked"):
            self.said.update((record["run"]["kind"], f"{how}: {what}") for what in record["migration"][how])
        return True


_LOSSES: dict[tuple[Any, ...], float] = {}


def first_identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's identity as it was hashed at first, from its record."""
    run, config, data = record["run"], record["config"], record["data"]
    decoder, basis = run["kind"] == "llama", record["basis"]
    model, protocol, scale = config["model"], config["protocol"], config["scale"]
    left_out = ("sources", *(("batch_size", "learning_rate") if decoder else ("search",)))
    found = {
        "version": record["version"],
        "kind": run["kind"],
        "model": {k: v for k, v in model.items() if k not in PLACES} | {"sha256": record["model"]["sha256"]},
        "method": deciding(config["method"]),
        "protocol": {name: value for name, value in protocol.items() if name not in left_out},
        "basis": ("task" if "task" in basis else "run") if basis else None,
        "hyperparameters": record["hyperparameters"],
        "seed": run["seed"],
        "scale": {name: for_task(scale[name], run["task"]) for name in SIZES[run["kind"]]},
    }
    group = composed("chat" if decoder else "glue")["chat" if decoder else "data"]
    if decoder:
        splits = {role: {"sha256": value, "rows": data["rows"][role]} for role, value in data["sha256"].items()}
        told = {"template": data["template"], "length": record["treatment"]["packed_tokens"]}
        return found | {"data": {key: group[key] for key in CHOICES} | splits | told}
    task = {"name": run["task"]} | {k: group["tasks"][run["task"]][k] for k in ("metric", "columns", "num_labels")}
    return found | {"task": task, "data_sha256": data["sha256"]}


@cache
def composed(name: str, *overrides: str) -> dict[str, Any]:
    """Today's configuration."""
    with initialize_config_dir(str(CONF), version_base=None):
        return OmegaConf.to_container(compose(name, list(overrides)), resolve=True)  # type: ignore[return-value]


@cache
def file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_identity(record: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its identity behind its ``run``."""
    items = [*record.items()]
    place = [name for name, _ in items].index("run") + 1
    return dict([*items[:place], ("identity", identity), *items[place:]])


def _same(path: Path, held: Any, found: Any, what: str) -> None:
    if held != found:
        raise Refused(f"{path} holds {held!r}, the {what} is {found!r}.")


if __name__ == "__main__":
    main()
