"""What stands around a table: which model stands for which, how numbers are compared, what was lost."""

from collections.abc import Iterable, Sequence

from finetune.report.evidence.evidence import Evidence, Run, Search
from finetune.report.model import Cell, Note
from finetune.report.paper import layouts
from finetune.report.paper.layouts import PAPER_MODELS, Place
from finetune.report.tables.cells import LOSS_MARGIN
from finetune.report.tables.comparability import PAPER_PROTOCOLS, keys_of


def models(places: Sequence[Place], evidence: Evidence, used: Sequence[Run | Search]) -> tuple[str, ...]:
    """Say of each model which of the paper's it stands for, what it started from, and at what scale it ran."""
    if places[0].part:
        return (
            "The paper's own architectures are counted here, whichever models the experiment runs.",
            "Embeddings and attention are their tables and projections; LayerNorms, poolers and output heads count in "
            "the full model alone.",
        )
    titles = {name: config.get("title", name) for name, config in evidence.models.items()}
    titles |= {run.model: run.title for runs in evidence.runs.values() for run in runs}
    sentences = []
    for paper, own in dict.fromkeys((place.model, place.own) for place in places):
        title = titles.get(own, own)
        if own in ("", evidence.experiment.stands_for.get(paper)):
            sentences.append(layouts.stands_for(paper, own, title))
        else:
            sentences.append(f"{title} ({own}) is a further model, in nobody's place.")
        runs = [one for one in used if one.model == own]
        if any(isinstance(one, Run) and one.random_weights for one in runs):
            sentences.append(f"{title} ({own}) started from random weights.")
        scales = sorted({one.scale for one in runs} - {"paper"})
        sentences += [f"{title} ({own}) ran at scale {', '.join(scales)}, which is not the paper's."] if scales else []
    return tuple(dict.fromkeys(sentences))


def rules(places: Sequence[Place], margin: float, *, stratified: bool) -> list[Note]:
    """State how the kinds of numbers in this table are computed and compared."""
    quantities = {place.quantity for place in places}
    welch = (
        "differs if the 95 % Welch interval of (ours - paper) excludes 0 and |ours - paper| exceeds the print's "
        "rounding; else it agrees if the interval lies within ±{:g}, and is inconclusive if not."
    )
    protocols = f"Protocols that may be compared with the print: {', '.join(PAPER_PROTOCOLS)}."
    found = []
    if quantities & {"score", "average"}:
        names = [name for name in layouts.PAPER_RUNS if any(place.model == name for place in places)]
        counts = " and ".join(f"{layouts.PAPER_RUNS[name]} for {PAPER_MODELS[name]}" for name in names)
        found += [
            "Scores are in percent on the validation split: Pearson for STSB, Matthews for CoLA, accuracy otherwise.",
            f"A score {welch.format(margin)} The paper's runs per mean are taken to be {counts}, its ± to be numpy's "
            f"population deviation. {protocols}",
        ]
    if "average" in quantities:
        found.append(
            "AVG is the mean of the 8 tasks' means with a stratified bootstrap interval; the paper prints no deviation "
            "for it, so its verdict uses the printed deviations of the tasks."
        )
    if quantities & {"count", "trainable"}:
        found.append("Counts are exact and agree if, rounded to the printed digits and unit, they are as printed.")
    if "learning_rate" in quantities:
        found.append("Batch sizes agree if equal, learning rates within a factor of 2.")
    if "loss" in quantities:
        found += [
            "#Train params is trainable / total parameters of the model that ran, in percent. It agrees if, rounded to "
            "the printed digits, it is as printed.",
            "Valid Loss is the best loss on the validation split, in nats a token, mean over seeds with a t interval; "
            f"lower is better. It {welch.format(LOSS_MARGIN)} The paper states no number of runs for this table; "
            f"{layouts.LLAMA_RUNS} are assumed, as it says for GLUE.",
            "I-Bench Score is FastChat's: the mean over both turns of all questions, an item judged several times with "
            "its median; mean over seeds, 95 % bootstrap interval over questions with the seeds averaged first"
            f"{', drawn within their categories' if stratified else ''}. The paper prints no deviation for it: at best "
            "the comparison is inconclusive.",
            protocols,
        ]
    return [Note("rule", text) for text in found]


def marks(cells: Iterable[Cell]) -> list[Note]:
    """Name the counts that round to other digits than the printed ones."""
    wrong = [(cell, one) for cell in cells for one in cell.reasons if one.kind in ("cut_off", "other_digits")]
    return [Note("mark", f"{cell.row}, {cell.column}: {reason.text}.") for cell, reason in wrong]


def losses(places: Sequence[Place], evidence: Evidence, versions: frozenset[int]) -> list[Note]:
    """Name the failed runs, the records that were left out, and mixed versions."""
    trained = [place for place in places if place.quantity not in layouts.SETTINGS]
    keys = dict.fromkeys(key for place in trained for key in keys_of(place, evidence))
    failed = [path for key in keys for path in evidence.failed.get(key, ())]
    found = [f"Failed runs: {len(failed)} ({', '.join(failed)})." if failed else "Failed runs: none."] if keys else []
    own = dict.fromkeys(place.own for place in places)
    if left_out := [line for model in own for line in evidence.left_out.get(model, ())]:
        found.append(f"Records left out: {len(left_out)} ({', '.join(left_out)}).")
    if len(versions) > 1:
        found.append(f"Mixed versions of the configuration: {', '.join(map(str, sorted(versions)))}.")
    return [Note("loss", text) for text in found]
