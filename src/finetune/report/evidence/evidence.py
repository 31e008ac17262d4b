"""What an experiment's runs left behind, checked and indexed: the one input of tables and statistics.

`collect_evidence` takes (path, content) pairs, `read_evidence` finds them on disk. A finished run is used once per
(model, method, task, seed); failed runs and files left out stay listed, to be named under the tables.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.mt_bench.agreement import read_agreements
from finetune.mt_bench.judged import Judged, read_judgments
from finetune.report.evidence.experiment import Experiment
from finetune.report.evidence.run import KINDS, Run, diverged, is_number, read_key, read_run, status_of
from finetune.store import catalog
from finetune.store import records as files

Key = tuple[str, str, str]
"""(model, method, task)."""

CHAT_TASK = "oasst1"
"""The task of every run of a decoder."""


@dataclass(frozen=True)
class Search:
    """A finished hyper-parameter search.

    Attributes:
        learning_rate: Of the best trial, as `batch_size`; `None` if no trial completed.
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
    """All that is of one experiment under its protocol.

    Attributes:
        runs: Finished runs by ascending seed.
        failed: Paths of the records of failed runs.
        diverged: Those among them whose loss or gradient was not finite.
        judged: (model, method) -> judgments by ascending seed, all by one judge on one question file.
        agreements: Records of judges that were validated (`finetune.mt_bench.agreement`).
        models: Name -> model configuration with `architecture`.
        left_out: Model -> sentences on records that no table can use.
    """

    experiment: Experiment
    runs: Mapping[Key, tuple[Run, ...]] = field(default_factory=dict)
    failed: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    diverged: frozenset[str] = frozenset()
    searches: Mapping[Key, Search] = field(default_factory=dict)
    judged: Mapping[tuple[str, str], tuple[Judged, ...]] = field(default_factory=dict)
    agreements: tuple[Mapping[str, Any], ...] = ()
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def decoders(self) -> tuple[str, ...]:
        """The decoders: the one in LLaMa-2's place first, then all others that ran or were judged."""
        first = self.experiment.stands_for.get("llama2_7b")
        ran = [model for model, _, task in (*self.runs, *self.failed) if task == CHAT_TASK]
        return tuple(dict.fromkeys([*([first] if first else []), *ran, *(model for model, _ in self.judged)]))


def read_evidence(experiment: Experiment, results: Path, conf: Path = catalog.CONF) -> Evidence:
    """Collect what lies below `results/<name>`, and the validated judges beside it.

    Raises:
        ValueError: As `collect_evidence`, or if a file is damaged.
    """
    return collect_evidence(
        experiment,
        records=[(path.as_posix(), record) for path, record in files.iterate(results / "runs")],
        searches=[(p.as_posix(), files.read_record(p)) for p in sorted(results.glob("search/*/*/*.json"))],
        judgments=read_judgments(results / "mt_bench" / "judgments"),
        agreements=read_agreements(results.parent),
        models=catalog.read_models(conf),
    )


def collect_evidence(
    experiment: Experiment,
    *,
    records: Iterable[tuple[str, Mapping[str, Any]]] = (),
    searches: Iterable[tuple[str, Mapping[str, Any]]] = (),
    judgments: Iterable[Judged] = (),
    agreements: Iterable[Mapping[str, Any]] = (),
    models: Mapping[str, Mapping[str, Any]] | None = None,
) -> Evidence:
    """Check and index what ran.

    Records of another `kind` than a training run's belong elsewhere and are skipped. Those of another experiment or
    protocol, or of a method or task that the experiment does not name, are left out and listed.

    Args:
        experiment: What the experiment names.
        records: (relative path, record) of each run; `searches` likewise.
        judgments: What `finetune.mt_bench.judged.read_judgments` found.
        agreements: What `finetune.mt_bench.agreement.read_agreements` found.
        models: Name -> model configuration, for titles, table 1 and the shares of table 6.

    Raises:
        ValueError: If a record is incomplete, a score is out of range, two files are of the same run, or judgments of
            several judges or question files are mixed.
    """
    left_out: dict[str, list[str]] = {}
    runs, failed, not_finite = _index_runs(_used(records, experiment, (*KINDS,), left_out))
    found: dict[Key, Search] = {}
    for path, key, result in _used(searches, experiment, ("search",), left_out):
        put_once(found, key, path, _search(path, result), "search")
    by_path = {one.path: one for one in judgments}
    judged = _used([(path, one.record) for path, one in by_path.items()], experiment, ("judgments",), left_out)
    return Evidence(
        experiment=experiment,
        runs=runs,
        failed=failed,
        diverged=not_finite,
        searches=found,
        judged=_index_judged([(key[:2], by_path[path]) for path, key, _ in judged]),
        agreements=tuple(agreements),
        models=models or {},
        left_out={model: tuple(sorted(lines)) for model, lines in left_out.items()},
    )


def wrong_names(path: str, content: Any, allowed: Mapping[str, Iterable[Any]]) -> list[str]:
    """Say which names of a record's `run` are not allowed."""
    own = {name: read_key(path, content, "run", name) for name in allowed}
    return [f"{name} {value}" for name, value in own.items() if value not in allowed[name]]


def _used(pairs, experiment: Experiment, kinds: Sequence[str], left_out: dict[str, list[str]]):
    """Yield (path, key, content) of the records whose names are the experiment's; list the others."""
    names = {"experiment": [experiment.name], "protocol": [experiment.protocol], "method": experiment.named}
    tasks = {"task": [*experiment.tasks, CHAT_TASK]}
    for path, content in pairs:
        kind = read_key(path, content, "run", "kind")
        if kind not in kinds:
            continue
        model = read_key(path, content, "run", "model")
        if wrong := wrong_names(path, content, names | (tasks if kind != "judgments" else {})):
            left_out.setdefault(model, []).append(f"{path} ({', '.join(wrong)})")
        else:
            yield path, (model, content["run"]["method"], content["run"].get("task", "")), content


def put_once(found: dict[Any, Any], key: Any, path: str, value: Any, what: str) -> None:
    """Put a value in, or raise the `ValueError` of two files that claim the same place."""
    if key in found:
        first = found[key].path
        raise ValueError(f"two {what} files of {key}: {first} and {path}; one is allowed: remove the stale one")
    found[key] = value


def _index_runs(used) -> tuple[dict[Key, tuple[Run, ...]], dict[Key, tuple[str, ...]], frozenset[str]]:
    """Index the finished runs by ascending seed, one per seed, and the paths of the failed and the diverged ones."""
    runs: dict[tuple, Run] = {}
    failed: dict[Key, list[str]] = {}
    not_finite = set()
    for path, key, record in used:
        if status_of(path, record) == "failed":
            failed.setdefault(key, []).append(path)
            not_finite |= {path} if diverged(record) else set()
        else:
            run = read_run(path, record)
            put_once(runs, (*key, run.seed), path, run, "record")
    return _by_seed(runs), {key: tuple(sorted(paths)) for key, paths in failed.items()}, frozenset(not_finite)


def _by_seed(found: Mapping[tuple, Any]) -> dict[Any, tuple]:
    """(..., seed) -> value as (...) -> values by ascending seed; keys in the order of their first appearance."""
    groups: dict[Any, dict[int, Any]] = {}
    for (*key, seed), value in found.items():
        groups.setdefault(tuple(key), {})[seed] = value
    return {key: tuple(seeds[seed] for seed in sorted(seeds)) for key, seeds in groups.items()}


def _search(path: str, result: Mapping[str, Any]) -> Search:
    """Read a search; `best` may be null where no trial completed."""
    best = read_key(path, result, "best")
    settings: dict[str, Any] = {"learning_rate": None, "batch_size": None}
    if best is not None:
        settings = {name: read_key(path, result, "best", name) for name in settings}
        if not all(is_number(value) and value > 0 for value in settings.values()):
            raise ValueError(f"{path}: best is {best!r}; a learning rate and a batch size above 0 are needed")
    states = Counter(trial.get("state", "unknown") for trial in read_key(path, result, "trials"))
    names = {name: read_key(path, result, "run", name) for name in ("model", "scale")}
    return Search(path=path, states=dict(sorted(states.items())), **names, **settings)


def _index_judged(pairs: Iterable[tuple[tuple[str, str], Judged]]) -> dict[tuple[str, str], tuple[Judged, ...]]:
    """Index judgments by (model, method) and seed, and refuse a mixture of judges. A server's port may change."""
    found: dict[tuple, Judged] = {}
    settings: dict[str, str] = {}
    for key, one in pairs:
        put_once(found, (*key, one.record["run"]["seed"]), one.path, one, "judgment")
        judge, questions = one.record["judge"], one.record["questions"]
        names = ("model", "temperature", "max_tokens", "repeats", "measures_quality")
        parts = [*(f"{name} {judge[name]}" for name in names), f"questions {questions['sha256'][:12]}"]
        settings[", ".join(parts)] = one.path
    if len(settings) > 1:
        mixed = "; ".join(f"{path}: {setting}" for setting, path in settings.items())
        raise ValueError(
            f"judgments of several judges or question files are mixed ({mixed}); scores of one table come from one: "
            "run the judgments stage again for all methods"
        )
    return _by_seed(found)
