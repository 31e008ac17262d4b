"""What the runs left behind, checked and indexed: the one input of every table.

A caller collects the JSON files and passes (path, content) pairs; nothing is read from disk here. A finished run is
used once per (model, method, task, seed); failed runs and files left out stay listed, to be named under the tables.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.published import TASKS
from finetune.report.paper.layouts import METHODS, PAPER_MODELS

Key = tuple[str, str, str]
"""(model, method, task)."""


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        path: Path of its record.
        model: Name of the model that ran.
        title: Its title for readers.
        task: Task of the run.
        seed: Seed of the run.
        score: Metric on the validation split, in percent.
        metric: Name of the metric.
        scale: Sizes and steps: `smoke`, `local` or `paper`.
        version: Version of the configuration.
        random_weights: Whether the model started from random weights.
        trainable: Number of trainable parameters of the model.
        trainable_per_layer: Entries of one wrapped MLP matrix that a step updates, mean over the wrapped matrices.
        matrix: Entries of one wrapped MLP matrix; `None` where the record's configuration does not tell.
    """

    path: str
    model: str
    title: str
    task: str
    seed: int
    score: float
    metric: str
    scale: str
    version: int
    random_weights: bool
    trainable: int
    trainable_per_layer: float
    matrix: int | None = None


@dataclass(frozen=True)
class Search:
    """A finished hyper-parameter search.

    Attributes:
        path: Path of its result.
        model: Name of the model that ran.
        scale: As in `Run`.
        learning_rate: Of the best trial; `None` if no trial completed.
        batch_size: Likewise.
        states: State of a trial -> number of trials.
    """

    path: str
    model: str
    scale: str
    learning_rate: float | None
    batch_size: int | None
    states: Mapping[str, int]


@dataclass(frozen=True)
class Evidence:
    """All runs of one experiment under one protocol.

    Attributes:
        experiment: Name of the experiment.
        protocol: `printed`, `released` or `sound`.
        stands_for: The paper's model -> the model that ran in its place, or `None`.
        runs: (model, method, task) -> finished runs by ascending seed.
        failed: (model, method, task) -> paths of the records of failed runs.
        searches: (model, method, task) -> search.
        models: Name -> (path, model configuration with `architecture`).
        left_out: Model -> sentences on records that no table can use.
        bases: Variant among the records -> the method that implements it.
    """

    experiment: str
    protocol: str
    stands_for: Mapping[str, str | None]
    runs: Mapping[Key, tuple[Run, ...]] = field(default_factory=dict)
    failed: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    searches: Mapping[Key, Search] = field(default_factory=dict)
    models: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)


def collect_evidence(
    *,
    experiment: str,
    protocol: str,
    stands_for: Mapping[str, str | None],
    records: Iterable[tuple[str, Mapping[str, Any]]] = (),
    searches: Iterable[tuple[str, Mapping[str, Any]]] = (),
    models: Iterable[tuple[str, Mapping[str, Any]]] = (),
) -> Evidence:
    """Check and index what ran.

    Records of another `kind` than `train` belong to other tables and are skipped. Records of another experiment,
    protocol, method or task are left out and listed. A variant of a method is known by its records' `method.base`.

    Args:
        experiment: Name of the experiment.
        protocol: Name of the protocol.
        stands_for: The paper's model (`bert_base`, `roberta_base`, `roberta_large`, `llama2_7b`) -> the model that ran
            in its place; missing or `None`: not run. Equal names: the paper's own model.
        records: (relative path, record) of each run.
        searches: (relative path, result) of each search.
        models: (relative path, model configuration) for table 1.

    Returns:
        The evidence for `build_table`.

    Raises:
        ValueError: If a name is unknown, a record is incomplete, a score is not a number in [-1, 1], or two finished
            records (or two searches) are of the same run.
    """
    unknown = [name for name in stands_for if name not in PAPER_MODELS]
    if unknown:
        raise ValueError(f"stands_for has {unknown}; its keys are the paper's models: {', '.join(PAPER_MODELS)}")
    left_out: dict[str, list[str]] = {}
    records = list(records)
    bases = bases_of(records)
    allowed = {"experiment": [experiment], "protocol": [protocol], "method": [*METHODS.values(), *bases]}
    runs, failed = _index_runs(_used(records, allowed, left_out))
    found: dict[Key, Search] = {}
    for path, key, result in _used(searches, allowed, left_out):
        if key in found:
            refuse_twice("search", key, found[key].path, path)
        found[key] = _search(path, result)
    return Evidence(
        experiment=experiment,
        protocol=protocol,
        stands_for=dict(stands_for),
        runs=runs,
        failed=failed,
        searches=found,
        models=_models(models),
        left_out={model: tuple(sorted(lines)) for model, lines in left_out.items()},
        bases=bases,
    )


def bases_of(records: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Variant -> the method that implements it, as the records' own configurations say."""
    found = {}
    for _, record in records:
        method = record.get("config", {}).get("method", {}) if isinstance(record, Mapping) else {}
        if method.get("base") in METHODS.values():
            found[method["name"]] = method["base"]
    return found


def _used(pairs, allowed: Mapping[str, Sequence[str]], left_out: dict[str, list[str]]):
    """Yield (path, key, content) of the training runs whose names are allowed; list the others."""
    allowed = {**allowed, "task": [*TASKS]}
    for path, content in pairs:
        if read_key(path, content, "run", "kind") not in ("train", "search"):
            continue
        model = read_key(path, content, "run", "model")
        other = {name: read_key(path, content, "run", name) for name in allowed}
        wrong = [f"{name} {value}" for name, value in other.items() if value not in allowed[name]]
        if wrong:
            left_out.setdefault(model, []).append(f"{path} ({', '.join(wrong)})")
        else:
            yield path, (model, other["method"], other["task"]), content


def _index_runs(used) -> tuple[dict[Key, tuple[Run, ...]], dict[Key, tuple[str, ...]]]:
    """Index the finished runs by ascending seed, one per seed, and the paths of the failed ones."""
    runs: dict[Key, dict[int, Run]] = {}
    failed: dict[Key, list[str]] = {}
    for path, key, record in used:
        if status_of(path, record) == "failed":
            failed.setdefault(key, []).append(path)
            continue
        run = _run(path, record)
        same = runs.setdefault(key, {}).setdefault(run.seed, run)
        if same is not run:
            refuse_twice("record", (*key, run.seed), same.path, path)
    by_seed = {key: tuple(found[seed] for seed in sorted(found)) for key, found in runs.items()}
    return by_seed, {key: tuple(sorted(paths)) for key, paths in failed.items()}


def _run(path: str, record: Mapping[str, Any]) -> Run:
    """Read a finished run."""
    score = read_key(path, record, "score")
    if not is_number(score) or not -1 <= score <= 1:
        raise ValueError(
            f"{path}: score is {score!r}; a finished run has a finite score in [-1, 1] (a fraction, not percent): "
            "repair the run or set its status to 'failed'"
        )
    seed, version = (read_key(path, record, *keys) for keys in (("run", "seed"), ("version",)))
    counts = {name: read_key(path, record, "parameters", name) for name in ("trainable", "trainable_per_layer")}
    bad = [name for name, count in counts.items() if not is_number(count) or count < 0]
    if bad or not isinstance(seed, int) or not isinstance(version, int):
        raise ValueError(f"{path}: seed={seed!r}, version={version!r}, {counts}; integers and counts >= 0 are needed")
    return Run(
        path=path,
        model=read_key(path, record, "run", "model"),
        title=read_key(path, record, "model", "title"),
        task=read_key(path, record, "run", "task"),
        seed=seed,
        score=100 * score,
        metric=read_key(path, record, "metric"),
        scale=read_key(path, record, "run", "scale"),
        version=version,
        random_weights=bool(read_key(path, record, "model", "random_weights")),
        matrix=_matrix(record),
        **counts,
    )


def _matrix(record: Mapping[str, Any]) -> int | None:
    """Entries of one MLP matrix of the model that ran."""
    architecture = record.get("config", {}).get("model", {}).get("architecture", {})
    sides = [architecture.get(name) for name in ("hidden_size", "intermediate_size")]
    return sides[0] * sides[1] if all(isinstance(side, int) for side in sides) else None


def _search(path: str, result: Mapping[str, Any]) -> Search:
    """Read a search; `best` may be null where no trial completed."""
    best = read_key(path, result, "best")
    settings = {"learning_rate": None, "batch_size": None}
    if best is not None:
        settings = {name: read_key(path, result, "best", name) for name in settings}
        if not all(is_number(value) and value > 0 for value in settings.values()):
            raise ValueError(f"{path}: best is {best!r}; a learning rate and a batch size above 0 are needed")
    trials = [trial.get("state", "unknown") for trial in read_key(path, result, "trials")]
    states = {state: trials.count(state) for state in sorted(set(trials))}
    names = {name: read_key(path, result, "run", name) for name in ("model", "scale")}
    return Search(path=path, states=states, **names, **settings)


def _models(pairs) -> dict[str, tuple[str, Mapping[str, Any]]]:
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for path, config in pairs:
        name = read_key(path, config, "name")
        if name in found:
            refuse_twice("model configuration", (name,), found[name][0], path)
        found[name] = (path, config)
    return found


def status_of(path: str, record: Mapping[str, Any]) -> str:
    """Return `finished` or `failed`, or refuse a record of another schema or status."""
    schema, status = read_key(path, record, "schema"), read_key(path, record, "status")
    if schema != 1 or status not in ("finished", "failed"):
        raise ValueError(f"{path}: schema={schema!r}, status={status!r}; schema 1, 'finished' or 'failed' are read")
    return status


def read_key(path: str, content: Any, *keys: str) -> Any:
    """Read a nested key, or say which one is missing where."""
    value = content
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{path}: there is no {'.'.join(keys)!r}; write the file again, or leave it out")
        value = value[key]
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def refuse_twice(what: str, key: tuple, first: str, second: str):
    """Raise the `ValueError` of two files that claim the same place."""
    raise ValueError(f"two {what} files of {key}: {first} and {second}; one is allowed: remove the stale one")
