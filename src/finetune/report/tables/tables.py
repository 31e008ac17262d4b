"""The paper's tables 1, 4, 5 and 9 to 15 from the records of the runs.

evidence = collect_evidence(experiment=..., protocol=..., stands_for=..., records=..., searches=..., models=...)
rows, context = build_table(9, evidence)
write_table(folder, 9, rows, context)
"""

from collections.abc import Sequence
from typing import Any

from finetune.report.evidence.evidence import Evidence, Run, Search, collect_evidence
from finetune.report.paper import layouts
from finetune.report.paper.architectures import count_parameters
from finetune.report.paper.k_notes import k_notes
from finetune.report.paper.layouts import K_TABLES, PAPER_MODELS, SETTINGS, TABLES, Cell
from finetune.report.tables.comparability import PAPER_PROTOCOLS, keys_of
from finetune.report.tables.rows import COLUMNS, Frame, build_row
from finetune.report.tables.writers import Context, write_table
from finetune.stats import verdicts

__all__ = ["COLUMNS", "TABLES", "Context", "build_table", "collect_evidence", "write_table"]


def build_table(
    number: int, evidence: Evidence, *, margin: float = 1.0, seed: int = 0
) -> tuple[list[dict[str, Any]], Context]:
    """Build a table with the paper's row and column labels; what did not run stands there as `not run`.

    Args:
        number: One of `TABLES`.
        evidence: What ran (`collect_evidence`).
        margin: Largest difference from the paper that counts as agreement, in points (`stats.verdict`).
        seed: Seed of the bootstrap behind the interval of `AVG`.

    Returns:
        The rows, one dict with the keys `COLUMNS` per cell, and the context for `write_table`.

    Raises:
        ValueError: If the table has no layout.
    """
    cells = layouts.cells(number)
    used = _used(cells, evidence)
    named = {cell.model for cell in cells if cell.part} & set(evidence.models)
    counts = {name: count_parameters(evidence.models[name][1]["architecture"]) for name in named}
    versions = frozenset(run.version for run in used if isinstance(run, Run))
    frame = Frame(evidence=evidence, versions=versions, counts=counts, margin=margin, seed=seed)
    rows = [build_row(cell, frame) for cell in cells]
    own = k_notes(cells) if number in K_TABLES else ()
    context = Context(
        experiment=evidence.experiment,
        protocol=evidence.protocol if number != 1 else "",
        title=layouts.title(number),
        models=_places(cells, evidence, used),
        notes=(*_rules(cells, margin), *own, *_marks(cells, rows), *_losses(cells, evidence, versions)),
    )
    return rows, context


def _used(cells: Sequence[Cell], evidence: Evidence) -> list[Run | Search]:
    """List the runs, or the searches, behind a table, each once."""
    found: dict[str, Run | Search] = {}
    for cell in cells:
        for key in keys_of(cell, evidence):
            search = [evidence.searches[key]] if key in evidence.searches else []
            ones = search if cell.quantity in SETTINGS else evidence.runs.get(key, ())
            found |= {one.path: one for one in ones}
    return list(found.values())


def _places(cells: Sequence[Cell], evidence: Evidence, used: Sequence[Run | Search]) -> tuple[str, ...]:
    """Say which model stands in the place of each of the paper's."""
    if cells[0].part:
        return ("The paper's own architectures are counted here, whichever models the experiment runs.",)
    titles = {name: config.get("title", name) for name, (_, config) in evidence.models.items()}
    titles |= {run.model: run.title for runs in evidence.runs.values() for run in runs}
    sentences = []
    for name in dict.fromkeys(cell.model for cell in cells):
        paper, model = f"{PAPER_MODELS[name]} ({name})", evidence.stands_for.get(name)
        if not model:
            sentences.append(f"Nothing ran in the place of {paper}.")
            continue
        label = f"{titles[model]} ({model})" if model in titles else model
        own = [one for one in used if one.model == model]
        if model == name:
            sentences.append(f"{paper} is the paper's own model.")
        else:
            sentences.append(
                f"{label} stands in the place of {paper}. It is not the paper's model: its numbers show how the "
                "methods compare on it and do not reproduce the printed ones."
            )
        if any(isinstance(one, Run) and one.random_weights for one in own):
            sentences.append(f"{label} started from random weights.")
        scales = sorted({one.scale for one in own} - {"paper"})
        sentences += [f"{label} ran at scale {', '.join(scales)}, which is not the paper's."] if scales else []
    return tuple(dict.fromkeys(sentences))


def _rules(cells: Sequence[Cell], margin: float) -> list[str]:
    """State how the kinds of numbers in this table are computed and compared."""
    quantities = {cell.quantity for cell in cells}
    rules = []
    if quantities & {"score", "average"}:
        models = [name for name in layouts.PAPER_RUNS if any(cell.model == name for cell in cells)]
        counts = " and ".join(f"{layouts.PAPER_RUNS[name]} for {PAPER_MODELS[name]}" for name in models)
        rules += [
            "Scores are in percent on the validation split: Pearson for STSB, Matthews for CoLA, accuracy otherwise.",
            "A score differs if the 95 % Welch interval of (ours - paper) excludes 0 and |ours - paper| exceeds the "
            f"print's rounding; else it agrees if the interval lies within ±{margin:g} points, and is inconclusive if "
            f"not. The paper's runs per mean are taken to be {counts}, its ± to be numpy's population deviation. "
            f"Protocols that may be compared with the print: {', '.join(PAPER_PROTOCOLS)}.",
        ]
    if "average" in quantities:
        rules.append(
            "AVG is the mean of the 8 tasks' means with a stratified bootstrap interval; the paper prints no deviation "
            "for it, so its verdict uses the printed deviations of the tasks."
        )
    if quantities & {"count", "trainable"}:
        rules.append("Counts are exact and agree if, rounded to the printed digits and unit, they are as printed.")
    if "learning_rate" in quantities:
        rules.append("Batch sizes agree if equal, learning rates within a factor of 2.")
    return rules


def _marks(cells: Sequence[Cell], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name the counts that round to other digits than the printed ones, and the printed averages that do not add up."""
    marks = []
    for cell, row in zip(cells, rows, strict=True):
        rounding = [part for part in row["source"].split("; ") if " rounds to " in part]
        if row["verdict"] == verdicts.DIFFERS and rounding:
            marks.append(f"{cell.row}, {cell.column}: {rounding[0]}.")
        if "does not match" in cell.note:
            marks.append(f"{cell.row}, {cell.column} as printed ({cell.paper}): {cell.note}.")
    return marks


def _losses(cells: Sequence[Cell], evidence: Evidence, versions: frozenset[int]) -> list[str]:
    """Name the failed runs, the records that were left out, and mixed versions."""
    trained = [cell for cell in cells if cell.quantity not in SETTINGS]
    keys = dict.fromkeys(key for cell in trained for key in keys_of(cell, evidence))
    failed = [path for key in keys for path in evidence.failed.get(key, ())]
    losses = [f"Failed runs: {len(failed)} ({', '.join(failed)})." if failed else "Failed runs: none."] if keys else []
    models = dict.fromkeys(key[0] for cell in cells for key in keys_of(cell, evidence))
    left_out = [line for model in models for line in evidence.left_out.get(model, ())]
    if left_out:
        losses.append(f"Records left out: {len(left_out)} ({', '.join(left_out)}).")
    if len(versions) > 1:
        losses.append(f"Mixed versions of the configuration: {', '.join(map(str, sorted(versions)))}; see source.")
    return losses
