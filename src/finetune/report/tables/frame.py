"""What all cells of a table share, and how a cell is put together."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from finetune.report.evidence.evidence import Evidence, Run
from finetune.report.model import Cell, Reason
from finetune.report.paper.architectures import ParameterCounts
from finetune.report.paper.layouts import Place
from finetune.report.tables.comparability import keys_of, why_not_run
from finetune.stats import verdicts
from finetune.stats.intervals import Estimate

_SAME = ("row", "column", "quantity", "method", "task", "paper", "paper_std")
"""What a cell has from its place."""


@dataclass(frozen=True)
class Frame:
    """What all cells of a table share.

    Attributes:
        evidence: What ran.
        versions: Versions of the configuration among the table's runs; a mixture is flagged.
        counts: Model -> parameter counts, for table 1.
        readings: Reading of which matrices of LLaMa-2-7B train -> method -> share in percent, for table 6.
        categories: Question id -> category, within which questions are drawn.
        margin: Largest difference of scores that counts as agreement, in points.
        seed: Seed of the bootstraps.
    """

    evidence: Evidence
    versions: frozenset[int] = frozenset()
    counts: Mapping[str, ParameterCounts] = field(default_factory=dict)
    readings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    categories: Mapping[int, str] | None = None
    margin: float = 1.0
    seed: int = 0

    def runs(self, place: Place) -> list[Run]:
        """The finished runs behind a cell."""
        return [run for key in keys_of(place, self.evidence) for run in self.evidence.runs.get(key, ())]


def finish(
    place: Place,
    protocol: str,
    verdict: str,
    ours: Estimate | float | None = None,
    how: str = "",
    reasons: Iterable[Reason] = (),
    *,
    logs: str = "",
    flags: Iterable[str] = (),
    **fields: Any,
) -> Cell:
    """Put a cell together.

    `how` it was computed, `logs`: where the value of the authors' logs comes from; `fields` are the cell's.
    """
    value, low, high, n = astuple(ours) if isinstance(ours, Estimate) else (ours, None, None, None)
    paper = f"{place.source}{f' ({place.note})' if place.note else ''}" if place.source else place.note
    sources = {"paper": paper, "ours": how, "released": logs if fields.get("released") is not None else ""}
    words = [word for word in ("inferred", "ablation", "over_full") if getattr(place, word)]
    same = {name: getattr(place, name) for name in _SAME}
    text = {who: text for who, text in sources.items() if text}
    ends = {"value": value, "low": low, "high": high, "n": n, "verdict": verdict, "protocol": protocol}
    return Cell(**same, **ends, **fields, reasons=tuple(reasons), flags=(*words, *flags), sources=text)


def missing(place: Place, frame: Frame, *reasons: Reason, **released: Any) -> Cell:
    """A cell without a value of ours; the reasons are those of `why_not_run` if none is given."""
    found = reasons or why_not_run(place, frame.evidence)
    return finish(place, frame.evidence.experiment.protocol, verdicts.NOT_RUN, reasons=found, **released)


def trained(
    place: Place,
    frame: Frame,
    verdict: str,
    ours: Estimate | float,
    how: str,
    reasons: Iterable[Reason],
    **released: Any,
) -> Cell:
    """A cell that has training runs behind it; its records are theirs."""
    runs, failed = frame.runs(place), any(frame.evidence.failed.get(key) for key in keys_of(place, frame.evidence))
    words = {"failed_runs": failed, "mixed_versions": len(frame.versions) > 1}
    fields = {"model": runs[0].model, "records": tuple(run.path for run in runs)} | released
    flags = [word for word, holds in words.items() if holds]
    return finish(place, frame.evidence.experiment.protocol, verdict, ours, how, reasons, flags=flags, **fields)
