"""Training steps of all variants in every setting that was measured, eager and in graphs, now and before.

Tables 3, 7 and 8 are of one folder; these are of all folders of `results/<name>/efficiency`, and of
`results/<name>/before`, what an earlier commit took.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.published import TASKS
from finetune.report.evidence.run import is_number, read_key
from finetune.report.labels import Labels
from finetune.store import records

EAGER, GRAPHS, BEFORE = "eager", "graphs", "before"
MODES = {EAGER: "now", GRAPHS: "now, in graphs", BEFORE: "before"}
"""How steps were taken -> what readers call it; those of before are eager."""
_MODES = re.compile(r"(-graphs|-folded)+$")
"""Ends of the folders of one setting's records: in graphs, and choices of the folded form."""


@dataclass(frozen=True)
class Step:
    """A variant's training step.

    Attributes:
        seconds: Median over all timed steps.
        peak: Of memory, in bytes.
        over_full: Time over full fine-tuning's, in the same record; `None` where that was not measured. Of medians: a
            host that stalls in one round is in the mean of the rounds' ratios.
        peak_over_full: Likewise of memory.
        path: Of the record.
    """

    seconds: float
    peak: float
    over_full: float | None
    peak_over_full: float | None
    path: str


@dataclass
class Setting:
    """One model on one length of inputs, in one precision.

    Attributes:
        place: Folder and name of its records, such as `roberta_base-sound/cola`; a setting of the protocol printed
            has the model's folder.
        rows, tokens: Of a batch; tokens are those of a padded row, the mean over batches.
        checkpointing: Whether activations are computed again in the backward pass.
        steps: Mode -> variant -> step. What a second record of the setting measured again is left out.
        facts: Mode -> the records.
    """

    place: str
    model: str
    title: str
    task: str
    precision: str
    rows: int
    tokens: float
    checkpointing: bool
    steps: dict[str, dict[str, Step]] = field(default_factory=dict)
    facts: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def decoder(self) -> bool:
        """Whether its task is a number of rows, not one of GLUE."""
        return re.fullmatch(r"rows\d+", self.task) is not None

    def name(self, labels: Labels) -> str:
        """What readers call it: its task, or its rows, and precision."""
        size = f"{self.rows} rows" if self.decoder else labels.task(self.task)
        return f"{size}, {self.precision}{', checkpointing' if self.checkpointing else ''}"

    def modes(self) -> list[str]:
        """The modes that were measured, in the order of `MODES`."""
        return [mode for mode in MODES if mode in self.steps]

    def step(self, mode: str, variant: str) -> Step | None:
        return self.steps.get(mode, {}).get(variant)


def read_steps(results: Path) -> list[Setting]:
    """The settings below `results/<name>`: encoders by model, protocol and task, then decoders by rows.

    Raises:
        ValueError: If a record is damaged, or lacks a time or a peak of a finished variant.
    """
    found: dict[str, Setting] = {}
    for before, folder in ((False, results), (True, results / "before")):
        for path in sorted(folder.glob("efficiency/*/*.json")):
            record = records.read_record(path)
            if record["status"] == "finished":
                _put(found, path, record, before=before)
    return sorted(found.values(), key=_order)


def _put(found: dict[str, Setting], path: Path, record: Mapping[str, Any], *, before: bool) -> None:
    place = f"{_MODES.sub('', path.parent.name).removesuffix('-printed')}/{path.stem}"
    name, treatment = path.as_posix(), record["treatment"]
    mode = BEFORE if before else EAGER if treatment.get("graphs", "off") == "off" else GRAPHS
    rows = read_key(name, record, "treatment", "batch_size")
    setting = found.setdefault(
        place,
        Setting(
            place=place,
            model=read_key(name, record, "run", "model"),
            title=read_key(name, record, "model", "title"),
            task=path.stem,
            precision=treatment["precision"],
            rows=rows,
            tokens=read_key(name, record, "lengths", "mean_slots") / rows,
            checkpointing=treatment.get("checkpointing", False),
        ),
    )
    setting.steps[mode] = dict(_steps(name, record)) | setting.steps.get(mode, {})
    setting.facts.setdefault(mode, []).append(record)


def _steps(path: str, record: Mapping[str, Any]) -> Iterator[tuple[str, Step]]:
    entries = {entry["name"]: entry for entry in read_key(path, record, "variants") if entry["status"] == "finished"}
    peaks = {name: read_key(path, entry, "memory", "peak_training") for name, entry in entries.items()}
    times = {name: read_key(path, entry, "step_seconds", "median") for name, entry in entries.items()}
    for name, (seconds, peak) in {name: (times[name], peaks[name]) for name in entries}.items():
        if not all(is_number(value) and value > 0 for value in (seconds, peak)):
            raise ValueError(f"{path}: {name} takes {seconds} s and {peak} bytes; needed are numbers above 0")
    for name in entries:
        full = "full" in entries
        ratio, share = (own[name] / own["full"] if full else None for own in (times, peaks))
        yield name, Step(times[name], peaks[name], ratio, share, path)


def _order(setting: Setting) -> tuple[Any, ...]:
    task = [*TASKS].index(setting.task) if setting.task in TASKS else len(TASKS)
    return setting.decoder, setting.place.partition("/")[0], task, setting.rows, setting.task
