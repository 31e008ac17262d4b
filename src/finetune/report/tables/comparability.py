"""Whether a cell of ours may be compared with the printed one, what the comparison says, and why not."""

from collections.abc import Sequence

from finetune.published import TASKS
from finetune.report.evidence.evidence import CHAT_TASK, Evidence, Key, Run, Search
from finetune.report.model import Reason
from finetune.report.paper import layouts, printed
from finetune.report.paper.layouts import Place
from finetune.stats import intervals, verdicts

PAPER_PROTOCOLS = ("printed", "released")
"""Protocols whose scores may be compared with the printed ones; `sound` makes other choices than the paper."""


def keys_of(place: Place, evidence: Evidence) -> list[Key]:
    """List the (model, method, task) whose runs a cell is made of; none where no model stands for the paper's.

    An average is over the paper's tasks; a count is the same for all that ran.
    """
    if not place.own or not place.method:
        return []
    tasks = [place.task] if place.task else [*TASKS]
    if place.table == layouts.LLAMA_TABLE:
        tasks = [CHAT_TASK]
    elif place.quantity != "average" and not place.task:
        tasks += [task for task in evidence.experiment.tasks if task not in TASKS]
    return [(place.own, place.method, task) for task in tasks]


def reasons_against(
    place: Place, evidence: Evidence, runs: Sequence[Run | Search] = (), *, sizes: bool = True
) -> list[Reason]:
    """Say why a cell may not be compared with the paper.

    `sizes`: whether the value depends on scale, weights and metric; a parameter count does not.

    Returns:
        The reasons; none if it may be compared.
    """
    reasons = [] if place.paper else [Reason("not_printed", "the paper prints no value")]
    if place.inferred:
        reasons.append(Reason("inferred", "its value is inferred, not printed"))
    if place.own != place.model:
        reasons.append(Reason("other_model", f"{place.own} is not the paper's {place.model}"))
    protocol = evidence.experiment.protocol
    if protocol not in PAPER_PROTOCOLS:
        reasons.append(Reason("protocol", f"protocol {protocol} is not the paper's"))
    if not sizes:
        return reasons
    reasons += of_scale(run.scale for run in runs)
    trained = [run for run in runs if isinstance(run, Run)]
    if any(run.random_weights for run in trained):
        reasons.append(Reason("random_weights", "the model started from random weights"))
    wanted = layouts.METRICS | {CHAT_TASK: "loss"}
    other = dict.fromkeys((run.metric, wanted.get(run.task, run.metric)) for run in trained)
    return reasons + [Reason("metric", f"metric {own} is not {paper}") for own, paper in other if own != paper]


def of_scale(scales) -> list[Reason]:
    """The reason that sizes are not the paper's, if they are not."""
    other = sorted({*scales} - {"paper"})
    return [Reason("scale", f"scale {', '.join(other)} is not the paper's")] if other else []


def why_not_run(place: Place, evidence: Evidence) -> list[Reason]:
    """Say why a cell has no value: nothing stands for the model, no run finished, or the runs failed."""
    if not place.own:
        return [Reason("no_model", f"no model ran in {place.model}'s place")]
    if place.quantity in layouts.SETTINGS:
        return [Reason("no_search", f"no search of {place.own} ({place.method})")]
    if place.quantity == "judged":
        return [Reason("no_judgments", f"no judgments of answers by {place.own} ({place.method})")]
    failed = [path for key in keys_of(place, evidence) for path in evidence.failed.get(key, ())]
    reasons = [Reason("no_run", f"no finished run of {place.own} ({place.method})")]
    return reasons + ([Reason("failed", f"failed runs: {len(failed)} ({', '.join(failed)})")] if failed else [])


def score_verdict(place: Place, scores: Sequence[Sequence[float]], stds: Sequence[float | None], margin: float) -> str:
    """Compare a score, a loss or an average with the print (`intervals.verdict`).

    Args:
        place: A cell that may be compared.
        scores: Our scores, one sequence per task.
        stds: The printed deviation of each task. The paper prints none for an average: those of its tasks take its
            place.
        margin: Largest difference that counts as agreement, in the unit of the scores.
    """
    paper = place.number
    runs = layouts.PAPER_RUNS.get(place.model, layouts.LLAMA_RUNS)
    difference = intervals.difference_from_paper(scores, paper.value, stds, runs)
    return intervals.verdict(difference, rounding=paper.rounding, margin=margin)


def digits_verdict(text: str, exact: float | None, prints: str = "the paper prints") -> tuple[str, list[Reason]]:
    """Compare an exact count or share with printed digits.

    Args:
        text: The printed number; empty where there is none.
        exact: The count, or the share in percent; `None` where the records do not tell.
        prints: Who prints it.

    Returns:
        The verdict, and a reason `cut_off` or `other_digits` where other digits are printed than the count rounds to.
    """
    if not text or exact is None:
        return verdicts.NOT_COMPARABLE, []
    paper = printed.parse(text)
    if paper.round(exact).number == paper.number:
        return verdicts.AGREES, []
    cut = paper.truncate(exact).number == paper.number
    value = f"{exact:,}" if isinstance(exact, int) else f"{exact:,.3f} %"
    how = "cut off, not rounded" if cut else "neither rounded nor cut off"
    words = f"{value} rounds to {paper.round(exact).text}, {prints} {paper.text} ({how})"
    return verdicts.DIFFERS, [Reason("cut_off" if cut else "other_digits", words)]


def setting_verdict(place: Place, value: float) -> str:
    """Compare a batch size (equal) or a learning rate (within a factor of 2) with the print."""
    ratio = value / place.number.value
    same = ratio == 1 if place.quantity == "batch_size" else 0.5 <= ratio <= 2
    return verdicts.AGREES if same else verdicts.DIFFERS
