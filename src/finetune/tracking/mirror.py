"""What wandb gets of a finished record, whatever stage wrote it: names, configuration, history, summary, files.

The stages that train log as they go (:class:`finetune.tracking.tracker.Tracker`); search and basis stages send their
results when they are done, and :mod:`finetune.tracking.replay` sends any of them later. All use what stands here, so
that a replayed run is the tracked one, less the losses between evaluations, which no record holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.methods import base_method
from finetune.store import records
from finetune.tracking.tracker import (
    CONFIG,
    JOB_TYPES,
    SUMMARY,
    TRIAL_BATCH,
    TRIAL_BEST,
    TRIAL_RATE,
    TRIAL_SCORE,
    TRIAL_SECONDS,
    VALIDATION,
    VARIANT_METRICS,
    Artifact,
    chosen,
    group_of,
    name_of,
    run_id,
)


@dataclass(frozen=True)
class Mirror:
    """A run of wandb, as it is sent.

    Attributes:
        run: the record's ``run``; id, group and name come from it.
        job_type: of wandb: the stage.
        config, summary: JSON values.
        history: (step, values), steps ascending.
        artifacts: files that belong to it.
    """

    run: Mapping[str, Any]
    job_type: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Sequence[tuple[int, Mapping[str, Any]]] = ()
    artifacts: Sequence[Artifact] = field(default=())

    @property
    def id(self) -> str:
        """wandb's id."""
        return run_id(self.run)

    @property
    def group(self) -> str:
        """wandb's group."""
        return group_of(self.run)

    @property
    def name(self) -> str:
        """wandb's display name."""
        return name_of(self.run)

    @property
    def digest(self) -> str:
        """Hash of what is sent, files by their names; without provenance: a record written again is no other record."""
        config = {name: value for name, value in self.config.items() if name != "provenance"}
        artifacts = [[a.name, a.type, sorted(Path(f).name for f in a.files), dict(a.metadata)] for a in self.artifacts]
        history = [[step, dict(values)] for step, values in self.history]
        parts = (dict(self.run), self.job_type, config, dict(self.summary), history, artifacts)
        return records.config_hash(dict(enumerate(parts)))


def of_training(record: Mapping[str, Any]) -> Mirror:
    """A run of :mod:`finetune.runs.glue` or :mod:`finetune.runs.chat`: its evaluations are the history."""
    run = record["run"]
    history = [
        (row["step"], {f"{VALIDATION}{name}": value for name, value in row.items() if name != "step"})
        for row in record.get("evaluations", ())
    ]
    kind = JOB_TYPES.get(run["kind"], run["kind"])
    return Mirror(run, kind, chosen(record, CONFIG), chosen(record, SUMMARY), history)


def of_search(content: Mapping[str, Any], path: Path) -> Mirror:
    """A finished search: one step a trial, ``best`` in the summary and the file as an artefact."""
    run, best, history = content["run"], None, []
    for trial in content["trials"]:
        value = trial["value"]
        best = value if best is None or (value is not None and value > best) else best
        row = {
            TRIAL_SCORE: value,
            TRIAL_BEST: best,
            TRIAL_RATE: trial["learning_rate"],
            TRIAL_BATCH: trial["batch_size"],
            TRIAL_SECONDS: trial["seconds"],
        }
        history.append((trial["number"], {name: value for name, value in row.items() if value is not None}))
    artifact = Artifact(f"best-{run['model']}-{run['method']}-{run['task']}", "search", [path], content["best"])
    config = chosen(content, ("run", "seed", "version", "provenance"))
    summary = chosen(content, ("best", "best_is_at_edge", "n_trials"))
    return Mirror(run, "search", config, summary, history, [artifact])


def of_basis(experiment: str, model: str, report: Path, files: Sequence[Path]) -> Mirror:
    """A basis stage: times of the decompositions, and the bases as an artefact.

    Args:
        report: the JSON file of the stage.
        files: the bases; on a machine that has only the records they are missing, and no artefact is made.
    """
    run = {"experiment": experiment, "kind": "basis", "model": model}
    there = [path for path in files if path.is_file()]
    artifacts = [Artifact(f"bases-{model}", "basis", there)] if there else []
    return Mirror(run, "basis", {"run": run}, records.read_json(report), (), artifacts)


def bases_of(config: Mapping[str, Any]) -> list[Mirror]:
    """The basis stage whose files a configuration uses; nothing for methods without bases, or bases made in the run.

    The basis stage itself does not know the scale, which says whether wandb is used: the search, the first stage that
    reads the bases, sends them.
    """
    if base_method(config["method"]) != "sparsegrad" or config["basis"] is None:
        return []
    folder = Path(config["basis"])
    report = folder / "hosvd.json"
    files = sorted(folder.glob("*.safetensors"))
    return [of_basis(config["name"], config["model"]["name"], report, files)] if report.is_file() else []


def of_efficiency(record: Mapping[str, Any]) -> Mirror:
    """Steps per second and peaks of every variant that was measured."""
    config = chosen(record, ("run", "model", "treatment", "lengths", "device", "provenance"))
    summary: dict[str, Any] = {}
    for variant in record["variants"]:
        found = chosen(variant, ("status", "parameters", *VARIANT_METRICS))
        summary[variant["name"]] = found | chosen(variant.get("memory", {}), VARIANT_METRICS)
    return Mirror(record["run"], "efficiency", config, summary)


def of_other(record: Mapping[str, Any]) -> Mirror:
    """Answers and judgments: counts, tokens and seconds are the summary, all else the configuration."""
    results = ("status", "error", "counts", "tokens", "seconds")
    config = {name: value for name, value in record.items() if name not in (*results, "schema")}
    # The hash of a judgment is its judge's and its questions': model, method and seed are in `run` beside it.
    return Mirror(record["run"], record["run"]["kind"], config, chosen(record, results))


def collect(root: str | Path, experiment: str) -> Iterator[Mirror]:
    """Everything that an experiment's records hold, stage by stage.

    Args:
        root: the folder ``results``.
        experiment: name of a folder in it.

    Raises:
        ValueError: if the experiment has no records, or one is damaged.
    """
    place = Path(root) / experiment
    if not place.is_dir():
        there = ", ".join(sorted(path.name for path in Path(root).glob("*/"))) or "nothing"
        raise ValueError(f"{place} does not exist; {root} has {there}: run the experiment first.")
    for report in sorted(place.glob("basis/*/hosvd.json")):
        yield of_basis(experiment, report.parent.name, report, sorted(report.parent.glob("*.safetensors")))
    for report in sorted(place.glob("llama/basis/*.json")):
        yield of_basis(experiment, report.stem, report, [report.with_suffix(".safetensors")])
    for path in sorted(place.glob("search/*/*/*.json")):
        yield of_search(records.read_json(path), path)
    for folder in ("runs", "llama/runs"):
        for _, record in records.iterate(place / folder):
            yield of_training(record)
    for path in sorted(place.glob("efficiency/*/*.json")):
        yield of_efficiency(records.read_json(path))
    for _, record in records.iterate(place / "mt_bench"):
        yield of_other(record)
