"""What the LLaMa runs and the judge left behind, checked and indexed: the input of Table 6.

Training records come as (path, content) pairs and judgments as `finetune.mt_bench.judged` reads them; nothing is read
from disk here. What no cell can use stays listed, to be named under the table.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.mt_bench.judged import Judged
from finetune.report.evidence.evidence import bases_of, is_number, read_key, refuse_twice, status_of
from finetune.report.paper.layouts import METHODS, PAPER_MODELS

PAPER_MODEL = "llama2_7b"


@dataclass(frozen=True)
class LlamaRun:
    """A finished training run.

    Attributes:
        path: Path of its record.
        model: Name of the model that ran.
        title: Its title for readers.
        seed: Seed of the run.
        loss: Best loss on the validation split, in nats a token.
        metric: Name of the metric.
        scale: Sizes and steps: `smoke`, `local` or `paper`.
        version: Version of the configuration.
        random_weights: Whether the model started from random weights.
        trainable: Number of trainable parameters.
        total: Number of parameters of the model.
    """

    path: str
    model: str
    title: str
    seed: int
    loss: float
    metric: str
    scale: str
    version: int
    random_weights: bool
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable parameters in percent of the model."""
        return 100 * self.trainable / self.total


@dataclass(frozen=True)
class LlamaEvidence:
    """Training runs and judgments of one experiment under one protocol.

    Attributes:
        experiment: Name of the experiment.
        protocol: `printed`, `released` or `sound`.
        model: The model that ran in LLaMa-2-7B's place; `None`: none did.
        runs: Method -> finished runs by ascending seed.
        judged: Method -> judgments by ascending seed, all by one judge on one question file.
        failed: Method -> paths of the records of failed runs.
        left_out: Sentences on records that the table cannot use.
        bases: Variant among the runs -> the method that it varies. Table 6 has no rows for variants.
    """

    experiment: str
    protocol: str
    model: str | None
    runs: Mapping[str, tuple[LlamaRun, ...]]
    judged: Mapping[str, tuple[Judged, ...]]
    failed: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...]
    bases: Mapping[str, str] = field(default_factory=dict)


def collect_llama_evidence(
    *,
    experiment: str,
    protocol: str,
    stands_for: Mapping[str, str | None],
    records: Iterable[tuple[str, Mapping[str, Any]]] = (),
    judgments: Iterable[Judged] = (),
) -> LlamaEvidence:
    """Check and index what ran.

    Args:
        experiment: Name of the experiment.
        protocol: Name of the protocol.
        stands_for: As in `finetune.report.evidence.evidence.collect_evidence`; `llama2_7b` is read.
        records: (relative path, record) of each training run; those of another kind than `llama` are skipped.
        judgments: What `finetune.mt_bench.judged.read_judgments` found.

    Raises:
        ValueError: If a record is incomplete or its loss is not a number, two are of the same run, or judgments of
            several judges or question files are mixed.
    """
    unknown = [name for name in stands_for if name not in PAPER_MODELS]
    if unknown:
        raise ValueError(f"stands_for has {unknown}; its keys are the paper's models: {', '.join(PAPER_MODELS)}")
    model, records = stands_for.get(PAPER_MODEL), list(records)
    bases, methods = bases_of(records), [*METHODS.values()]
    wanted = {"experiment": [experiment], "protocol": [protocol], "model": [model], "method": [*methods, *bases]}
    left_out: list[str] = []
    runs: dict[str, dict[int, LlamaRun]] = {}
    failed: dict[str, list[str]] = {}
    for path, record in records:
        if read_key(path, record, "run", "kind") != "llama" or not _wanted(path, record, wanted, left_out):
            continue
        method = record["run"]["method"]
        if status_of(path, record) == "failed":
            failed.setdefault(method, []).append(path)
            continue
        run = _run(path, record)
        same = runs.setdefault(method, {}).setdefault(run.seed, run)
        if same is not run:
            refuse_twice("record", (model, method, run.seed), same.path, path)
    return LlamaEvidence(
        experiment=experiment,
        protocol=protocol,
        model=model,
        runs={method: tuple(found[seed] for seed in sorted(found)) for method, found in runs.items()},
        judged=_judged([one for one in judgments if _wanted(one.path, one.record, wanted, left_out)]),
        failed={method: tuple(sorted(paths)) for method, paths in failed.items()},
        left_out=tuple(sorted(left_out)),
        bases=bases,
    )


def _wanted(path: str, record: Mapping[str, Any], wanted: Mapping[str, list], left_out: list[str]) -> bool:
    """Whether a record is of this table; if not, list why."""
    found = {name: read_key(path, record, "run", name) for name in wanted}
    wrong = [f"{name} {value}" for name, value in found.items() if value not in wanted[name]]
    left_out += [f"{path} ({', '.join(wrong)})"] if wrong else []
    return not wrong


def _run(path: str, record: Mapping[str, Any]) -> LlamaRun:
    """Read a finished run."""
    loss = read_key(path, record, "score")
    if not is_number(loss) or loss < 0:
        raise ValueError(
            f"{path}: score is {loss!r}; a finished run has the best validation loss there, a number >= 0: repair the "
            "run or set its status to 'failed'"
        )
    seed, version = read_key(path, record, "run", "seed"), read_key(path, record, "version")
    counts = {name: read_key(path, record, "parameters", name) for name in ("trainable", "total")}
    if not all(is_number(count) and count > 0 for count in counts.values()) or counts["trainable"] > counts["total"]:
        raise ValueError(f"{path}: parameters are {counts}; counts above 0 are needed, trainable at most total")
    if not isinstance(seed, int) or not isinstance(version, int):
        raise ValueError(f"{path}: seed={seed!r}, version={version!r}; integers are needed")
    return LlamaRun(
        path=path,
        model=read_key(path, record, "run", "model"),
        title=read_key(path, record, "model", "title"),
        seed=seed,
        loss=float(loss),
        metric=read_key(path, record, "metric"),
        scale=read_key(path, record, "run", "scale"),
        version=version,
        random_weights=bool(read_key(path, record, "model", "random_weights")),
        **counts,
    )


def _judged(judgments: Iterable[Judged]) -> dict[str, tuple[Judged, ...]]:
    """Index judgments by method and seed, and refuse a mixture of judges."""
    found: dict[str, dict[int, Judged]] = {}
    settings: dict[str, str] = {}
    for one in judgments:
        run = one.record["run"]
        same = found.setdefault(run["method"], {}).setdefault(run["seed"], one)
        if same is not one:
            refuse_twice("judgment", (run["model"], run["method"], run["seed"]), same.path, one.path)
        settings[_setting(one)] = one.path
    if len(settings) > 1:
        mixed = "; ".join(f"{path}: {setting}" for setting, path in settings.items())
        raise ValueError(
            f"judgments of several judges or question files are mixed ({mixed}); scores of one table come from one: "
            "run the judgments stage again for all methods"
        )
    return {method: tuple(seeds[seed] for seed in sorted(seeds)) for method, seeds in found.items()}


def _setting(one: Judged) -> str:
    """What all judgments of a table share. The endpoint is no part of it: a local server's port changes."""
    judge, questions = one.record["judge"], one.record["questions"]
    names = ("model", "temperature", "max_tokens", "repeats", "measures_quality")
    return ", ".join([*(f"{name} {judge[name]}" for name in names), f"questions {questions['sha256'][:12]}"])
