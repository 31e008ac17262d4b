"""What all cells of a table share, and how a cell is put together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field

from finetune.report.evidence.evidence import Evidence, Run
from finetune.report.model import Cell, Reason
from finetune.report.paper.architectures import ParameterCounts
from finetune.report.paper.layouts import Place
from finetune.report.tables.comparability import keys_of, why_not_run
from finetune.stats import verdicts
from finetune.stats.intervals import Estimate


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
    verdict: str,
    *,
    protocol: str,
    ours: Estimate | float | None = None,
    how: str = "",
    reasons: Iterable[Reason] = (),
    flags: Iterable[str] = (),
    model: str = "",
    records: Iterable[str] = (),
    released: float | None = None,
    logs: str = "",
) -> Cell:
    """Put a cell together.

    Args:
        place: What the paper prints there, and what stands behind it.
        verdict: One of `verdicts.VERDICTS`.
        protocol: Name of the protocol behind ours.
        ours: Our value, with its interval if it has one.
        how: How it was computed.
        reasons: Why there is none, or why it may not be compared.
        flags: Words on ours.
        model: The model behind ours.
        records: Paths of the records behind ours.
        released: The value of the authors' logs.
        logs: Where that comes from.
    """
    value, low, high, n = astuple(ours) if isinstance(ours, Estimate) else (ours, None, None, None)
    paper = f"{place.source}{f' ({place.note})' if place.note else ''}" if place.source else place.note
    sources = {"paper": paper, "ours": how, "released": logs if released is not None else ""}
    words = {"inferred": place.inferred, "ablation": place.ablation, "over_full": place.over_full}
    return Cell(
        row=place.row,
        column=place.column,
        quantity=place.quantity,
        method=place.method,
        task=place.task,
        value=value,
        low=low,
        high=high,
        n=n,
        paper=place.paper,
        paper_std=place.paper_std,
        released=released,
        verdict=verdict,
        reasons=tuple(reasons),
        flags=(*(word for word, holds in words.items() if holds), *flags),
        sources={who: text for who, text in sources.items() if text},
        protocol=protocol,
        model=model,
        records=tuple(records),
    )


def missing(place: Place, frame: Frame, *reasons: Reason, **released) -> Cell:
    """A cell without a value of ours; the reasons are those of `why_not_run` if none is given."""
    found = reasons or why_not_run(place, frame.evidence)
    return finish(place, verdicts.NOT_RUN, protocol=frame.evidence.experiment.protocol, reasons=found, **released)


def trained(
    place: Place,
    frame: Frame,
    runs: Sequence[Run],
    verdict: str,
    ours: Estimate | float,
    how: str,
    reasons: Iterable[Reason],
    **released,
) -> Cell:
    """A cell that has training runs behind it."""
    failed = any(frame.evidence.failed.get(key) for key in keys_of(place, frame.evidence))
    words = {"failed_runs": failed, "mixed_versions": len(frame.versions) > 1}
    return finish(
        place,
        verdict,
        protocol=frame.evidence.experiment.protocol,
        ours=ours,
        how=how,
        reasons=reasons,
        flags=[word for word, holds in words.items() if holds],
        model=runs[0].model,
        records=[run.path for run in runs],
        **released,
    )
