"""Records of the efficiency stage, checked and indexed by task: the input of tables 3, 7 and 8."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.published import TASKS
from finetune.report.evidence.evidence import put_once, wrong_names
from finetune.report.evidence.experiment import Experiment
from finetune.report.evidence.run import is_number, read_key, status_of
from finetune.report.paper.layouts import stands_for
from finetune.store import records as files

PAPER_MODEL = "roberta_base"

BY_HAND = "hand"
"""Experiment of a record that was measured outside the pipeline: it is of the one in whose folder it lies."""


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
        model: The model measured in RoBERTa-base's place; empty: none.
        tasks: Task -> record, the paper's tasks first, in its order.
        left_out: Sentences on records that the tables cannot use.
        methods: Variant -> the method whose training takes its steps, in the order of the records.
    """

    experiment: str
    protocol: str
    model: str = ""
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    methods: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Which model was measured in RoBERTa-base's place."""
        titles = [record.facts["model"]["title"] for record in self.tasks.values()]
        words = stands_for(PAPER_MODEL, self.model, titles[0] if titles else "")
        return f"{words} Weights are random: speed and memory do not depend on them." if self.model else words


def read_efficiency_evidence(experiment: Experiment, results: Path) -> EfficiencyEvidence:
    """Collect the records below `results/<name>/efficiency` of the model that the tables are of.

    Raises:
        ValueError: As `collect_efficiency_evidence`, or if a file is damaged.
    """
    folder = results / "efficiency" / next(iter(experiment.efficiency_models), "none")
    found = [(path.as_posix(), files.read_record(path)) for path in sorted(folder.glob("*.json"))]
    return collect_efficiency_evidence(experiment, found)


def collect_efficiency_evidence(
    experiment: Experiment, records: Iterable[tuple[str, Mapping[str, Any]]] = ()
) -> EfficiencyEvidence:
    """Check and index what was measured.

    Records of another experiment, protocol, model or task are left out and listed.

    Raises:
        ValueError: If a record is incomplete, holds a value that is no number above 0, or two are of the same task.
    """
    model = next(iter(experiment.efficiency_models), "")
    allowed = {"experiment": [experiment.name, BY_HAND], "protocol": [experiment.protocol], "model": [model]}
    found: dict[str, TaskRecord] = {}
    methods: dict[str, str] = {}
    left_out = []
    for path, record in records:
        if read_key(path, record, "run", "kind") != "efficiency":
            continue
        wrong = wrong_names(path, record, allowed | {"task": [*experiment.tasks]})
        if wrong or status_of(path, record) != "finished":
            left_out.append(f"{path} ({', '.join(wrong) or 'failed'})")
            continue
        put_once(found, record["run"]["task"], path, _task(path, record), "record")
        for entry in record["variants"]:
            # The two products and the folded form take SparseGrad's steps; a truncated one takes its own.
            own = entry["name"] in experiment.named or entry.get("form") == "truncated"
            methods.setdefault(entry["name"], entry["name"] if own else entry.get("method", entry["name"]))
    return EfficiencyEvidence(
        experiment=experiment.name,
        protocol=experiment.protocol,
        model=model,
        tasks={task: found[task] for task in dict.fromkeys([*TASKS, *found]) if task in found},
        left_out=tuple(sorted(left_out)),
        methods=methods,
    )


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
