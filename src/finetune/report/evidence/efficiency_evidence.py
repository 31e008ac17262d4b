"""Records of the efficiency stage, checked and indexed by task: the input of tables 3, 7 and 8."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.published import TASKS
from finetune.report.evidence.evidence import Run, is_number, read_key, refuse_twice, status_of

PAPER_MODEL = "roberta_base"


@dataclass(frozen=True)
class Measured:
    """One variant on one task.

    Attributes:
        steps_per_second: One value a round, all rounds over the same batches.
        ratios: Those over full fine-tuning's of the same round; empty where full fine-tuning was not measured.
        peak_training: Of a whole step, in MB (10^6 bytes).
        peak_evaluation: Of a forward pass without gradients, in MB.
    """

    steps_per_second: tuple[float, ...]
    ratios: tuple[float, ...]
    peak_training: float
    peak_evaluation: float


@dataclass(frozen=True)
class TaskRecord:
    """All variants on one task.

    Attributes:
        path: Path of the record.
        variants: Name -> what was measured.
        missing: Name -> why a variant was not measured.
        facts: The record itself, for the notes.
    """

    path: str
    variants: Mapping[str, Measured]
    missing: Mapping[str, str]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class EfficiencyEvidence:
    """What was measured in one experiment.

    Attributes:
        experiment: Name of the experiment.
        protocol: `printed`, `released` or `sound`.
        model: The model measured in RoBERTa-base's place; `None`: none.
        tasks: Task -> record, in the order of `finetune.published.TASKS`.
        left_out: Sentences on records that the tables cannot use.
        scores: (variant, task) -> (path, validation score in percent) of the same model's training runs, by seed.
    """

    experiment: str
    protocol: str
    model: str | None
    tasks: Mapping[str, TaskRecord]
    left_out: tuple[str, ...]
    scores: Mapping[tuple[str, str], tuple[tuple[str, float], ...]] = field(default_factory=dict)


def collect_efficiency_evidence(
    *,
    experiment: str,
    protocol: str,
    models: Sequence[str],
    records: Iterable[tuple[str, Mapping[str, Any]]] = (),
    runs: Mapping[tuple[str, str, str], Sequence[Run]] | None = None,
) -> EfficiencyEvidence:
    """Check and index what was measured.

    Args:
        experiment: Name of the experiment.
        protocol: Name of the protocol.
        models: `efficiency_models` of the experiment; the first stands in RoBERTa-base's place.
        records: (relative path, record); those of another experiment, protocol, model or task are left out and listed.
        runs: `Evidence.runs` of the experiment: what each way of training reached stands beside its speed.

    Raises:
        ValueError: If a record is incomplete, holds a value that is no number above 0, or two are of the same task.
    """
    model = models[0] if models else None
    wanted = {"experiment": [experiment], "protocol": [protocol], "model": [model], "task": [*TASKS]}
    found: dict[str, TaskRecord] = {}
    left_out = []
    for path, record in records:
        if read_key(path, record, "run", "kind") != "efficiency":
            continue
        own = {name: read_key(path, record, "run", name) for name in wanted}
        wrong = [f"{name} {value}" for name, value in own.items() if value not in wanted[name]]
        if wrong or status_of(path, record) != "finished":
            left_out.append(f"{path} ({', '.join(wrong) or 'failed'})")
            continue
        if own["task"] in found:
            refuse_twice("record", (model, own["task"]), found[own["task"]].path, path)
        found[own["task"]] = _task(path, record)
    return EfficiencyEvidence(
        experiment=experiment,
        protocol=protocol,
        model=model,
        tasks={task: found[task] for task in TASKS if task in found},
        left_out=tuple(sorted(left_out)),
        scores=_scores(model, runs or {}),
    )


METHODS = {
    "full": "full",
    "lora": "lora",
    "meprop": "meprop",
    "rotated_regular": "sparsegrad",
    "rotated_sparse_by_dense": "sparsegrad",
    "folded": "sparsegrad",
    "truncated": "truncated",
    "truncated_input": "truncated_input",
}
"""Variant -> method whose runs took its steps: the two products and the folded form take the same ones."""


def _scores(
    model: str | None, runs: Mapping[tuple[str, str, str], Sequence[Run]]
) -> dict[tuple[str, str], tuple[tuple[str, float], ...]]:
    """Scores of every variant's method, by task."""
    return {
        (variant, task): tuple((run.path, run.score) for run in runs[model, method, task])
        for variant, method in METHODS.items()
        for task in TASKS
        if model is not None and runs.get((model, method, task))
    }


def _task(path: str, record: Mapping[str, Any]) -> TaskRecord:
    variants, missing = {}, {}
    for entry in read_key(path, record, "variants"):
        name = read_key(path, entry, "name")
        if read_key(path, entry, "status") != "finished":
            missing[name] = read_key(path, entry, "reason")
            continue
        peaks = {key: read_key(path, entry, "memory", key) for key in ("peak_training", "peak_evaluation")}
        rounds, ratios = read_key(path, entry, "rounds"), entry.get("ratio_to_full", {}).get("rounds", [])
        values = [*rounds, *ratios, *peaks.values()]
        if not rounds or not all(is_number(value) and value > 0 for value in values):
            raise ValueError(f"{path}: {name} holds {values}; needed are numbers above 0, at least one round")
        variants[name] = Measured(tuple(rounds), tuple(ratios), **{key: peak / 1e6 for key, peak in peaks.items()})
    for key in (("device", "name"), ("treatment", "batch_size"), ("model", "title"), ("lengths", "padded_share")):
        read_key(path, record, *key)
    return TaskRecord(path, variants, missing, record)
