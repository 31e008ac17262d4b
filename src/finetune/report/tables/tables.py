"""The paper's tables from what an experiment's runs left behind.

experiment = load_experiment("params.yaml", "local")
evidence, measured = read_evidence(experiment, results), read_efficiency_evidence(experiment, results)
table = build_table(9, evidence, measured)
write_files(results / "tables", table)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from finetune.report.evidence.efficiency_evidence import EfficiencyEvidence
from finetune.report.evidence.evidence import Evidence, Run, Search
from finetune.report.model import Note, Table
from finetune.report.paper.architectures import count_parameters
from finetune.report.paper.k_notes import average_notes, k_notes
from finetune.report.paper.layouts import (
    EFFICIENCY_TABLES,
    K_TABLES,
    LLAMA_TABLE,
    PAPER_MODELS,
    SETTINGS,
    Place,
    printed_places,
    title,
)
from finetune.report.paper.shares import trainable_shares
from finetune.report.tables import notes
from finetune.report.tables.cells import Frame, build_cell
from finetune.report.tables.comparability import keys_of
from finetune.report.tables.efficiency import build_efficiency_table
from finetune.report.tables.judging import judging_notes, reading_notes
from finetune.report.tables.places import row_by_row, score_places


def build_table(
    number: int,
    evidence: Evidence,
    measured: EfficiencyEvidence | None = None,
    *,
    categories: Mapping[int, str] | None = None,
    margin: float = 1.0,
    seed: int = 0,
) -> Table:
    """Build a table with the paper's labels and the experiment's; what did not run stands there as `not run`.

    Args:
        number: One of `layouts.TITLES`.
        evidence: What ran.
        measured: What was measured, for tables 3, 7 and 8.
        categories: Question id -> category, for table 6: adds the scores by category to the notes, and stratifies the
            bootstrap.
        margin: Largest difference from the paper that counts as agreement, in points (`intervals.verdict`).
        seed: Seed of the bootstraps.

    Raises:
        ValueError: If the table has no layout, a judged question has no category, or two cells have the same labels.
    """
    name, experiment = title(number), evidence.experiment
    if number in EFFICIENCY_TABLES:
        measured = measured or EfficiencyEvidence(experiment.name, experiment.protocol)
        return build_efficiency_table(number, measured, evidence, seed=seed)
    places = score_places(number, evidence)
    used = _used(places, evidence)
    versions = frozenset(run.version for run in used if isinstance(run, Run))
    wanted = {place.model for place in places if number == 1} & set(evidence.models)
    counts = {model: count_parameters(evidence.models[model]["architecture"]) for model in wanted}
    llama = evidence.models.get("llama2_7b") if number == LLAMA_TABLE else None
    shares = trainable_shares(llama) if llama else None
    readings = {one.name: one.shares for one in shares.variants} if shares else {}
    frame = Frame(evidence, versions, counts, readings, categories, margin, seed)
    cells = [build_cell(place, frame) for place in _with_readings(places, readings)]
    judged = judging_notes(evidence, categories, seed) if number == LLAMA_TABLE else []
    found = (
        *notes.rules(places, margin, stratified=categories is not None),
        *(Note("print", text) for text in (k_notes(places) if number in K_TABLES else ())),
        *average_notes(number),
        *judged,
        *(reading_notes(shares) if shares else notes.marks(cells)),
        *notes.losses(places, evidence, versions),
    )
    return Table(
        number=number,
        name=f"table_{number:02d}",
        title=name,
        experiment=experiment.name,
        protocol=experiment.protocol if number != 1 else "",
        cells=tuple(cells),
        models=notes.models(places, evidence, used),
        notes=found,
        **({"counted": "seeds; judged items of all seeds in the column I-Bench Score"} if judged else {}),
    )


def _used(places: Sequence[Place], evidence: Evidence) -> list[Run | Search]:
    """List the runs, or the searches, behind a table, each once."""
    found: dict[str, Run | Search] = {}
    for place in places:
        for key in keys_of(place, evidence):
            search = [evidence.searches[key]] if key in evidence.searches else []
            ones = search if place.quantity in SETTINGS else evidence.runs.get(key, ())
            found |= {one.path: one for one in ones}
    return list(found.values())


def _with_readings(places: Sequence[Place], readings: Iterable[str]) -> list[Place]:
    """The cells with those of LLaMa-2-7B's shares, one column for each reading, beside the same printed number."""
    found = list(places)
    for one in printed_places(LLAMA_TABLE):
        if one.quantity == "trained_share":
            like = replace(one, quantity="share", own=one.model)
            paper = PAPER_MODELS[one.model]
            found += [replace(like, column=f"{paper} {name} share", part=name) for name in readings]
    return row_by_row(found)
