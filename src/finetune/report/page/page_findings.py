"""The findings at the top of the page: sentences whose every number is read from `statistics.json` or from a table.

No sentence is written by hand: each is a rule's, which says "not separated" where the test says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from finetune.published import TASKS
from finetune.report.figures.energy_evidence import TRAJECTORIES
from finetune.report.page.markup import Html, items, join, tag
from finetune.report.page.page_inputs import PageInputs
from finetune.report.page.page_tables import BuiltTable, Row
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.report.paper.printed_averages import CONTRADICTED, CUT_OFF
from finetune.report.statistics.markdown import interval, label, p_value
from finetune.report.tables.writers import format_value
from finetune.stats import verdicts

RATIO = " / Regular FT"


@dataclass(frozen=True)
class Finding:
    """A card.

    Attributes:
        title: The answer in a few words.
        lines: Sentences with numbers and intervals.
        after: What limits it.
    """

    title: str
    lines: tuple[str, ...]
    after: str = ""


def findings_html(inputs: PageInputs) -> Html:
    """The cards, or what is missing for them."""
    found = [*findings(inputs)]
    parts = []
    if inputs.statistics is None:
        name = inputs.experiment["name"]
        words = f"Statistics not run: results/{name}/statistics.json is missing, so nothing is said of scores."
        parts.append(tag("p", words, class_="none"))
    cards = [
        tag(
            "article",
            tag("h3", one.title),
            items(one.lines),
            tag("p", one.after, class_="quiet") if one.after else None,
        )
        for one in found
    ]
    parts.append(tag("div", "\n", *(join([card, "\n"]) for card in cards), class_="findings") if cards else Html(""))
    return join(parts, "\n")


def findings(inputs: PageInputs) -> Iterator[Finding]:
    """What the numbers say: our runs, then cost, then the paper's own numbers and logs."""
    content = inputs.statistics
    if content is not None:
        for entry in content["runs"]:
            yield from _own(entry)
    yield from _stale([one.content for one in inputs.found if one.kind == "energy"])
    yield from _loss(inputs.tables.get(6))
    for decoder in (content or {}).get("decoders", ()):
        yield from _losses(decoder)
    yield from _speed(inputs.tables.get(3))
    if content is not None:
        yield from _logs(content["logs"])
        yield from _averages(content["averages"])
        yield from _exchange(content["exchange"])


def pair_sentence(pair: Mapping[str, Any]) -> str:
    """Say what a paired test of two methods over all their tasks says.

    Args:
        pair: An entry of a family's `pairs` in `statistics.json`.
    """
    first, second, test = label(pair["first"]), label(pair["second"]), pair["mean"]
    better = {verdicts.FIRST_BETTER: f"{first} is better", verdicts.SECOND_BETTER: f"{second} is better"}
    few = ", so few pairs separate nothing" if test["least"] > verdicts.LEVEL else ""
    numbers = f"p {p_value(test['p_holm'])}, {test['pairs']} pairs{few}"
    verdict = better.get(test["verdict"], verdicts.NOT_SEPARATED)
    return f"{first} − {second}: {interval(test['difference'], '+')} points, {verdict} ({numbers})."


def _own(entry: Mapping[str, Any]) -> Iterator[Finding]:
    """Methods against each other, then each family of variants."""
    for family in entry["comparison"]["families"]:
        pairs = family["pairs"]
        if not pairs:
            continue
        apart = [pair for pair in pairs if pair["mean"]["verdict"] != verdicts.NOT_SEPARATED]
        separated = f"{len(apart)} of {len(pairs)} pairs" if apart else "no pair"
        shown = [pair for pair in pairs if pair in apart or family["name"] != "methods" or "sparsegrad" in _names(pair)]
        lines = [pair_sentence(pair) for pair in shown] + [*_single(pairs)]
        about = "Methods" if family["name"] == "methods" else family["name"][:1].upper() + family["name"][1:]
        yield Finding(f"{about} on {entry['title']}: {separated} separated", tuple(lines), _limits(entry, pairs))


def _names(pair: Mapping[str, Any]) -> tuple[str, str]:
    return pair["first"], pair["second"]


def _single(pairs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Single tasks on which two methods are separated."""
    for pair in pairs:
        for task, test in pair["tasks"].items():
            if test["verdict"] != verdicts.NOT_SEPARATED:
                first, second = label(pair["first"]), label(pair["second"])
                numbers = f"{interval(test['difference'], '+')} points, p {p_value(test['p_holm'])}"
                yield f"On {TASKS[task]} alone, {first} − {second}: {numbers}."


def _limits(entry: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    tasks = [task for task in TASKS if any(task in pair["tasks"] for pair in pairs)]
    counts = {test["pairs"] for pair in pairs for test in pair["tasks"].values()}
    seeds = " to ".join(str(count) for count in dict.fromkeys((min(counts), max(counts))))
    paper = [PAPER_MODELS[name] for name in entry["stands_for"] if name != entry["model"]]
    place = f" {entry['title']} stands in the place of {', '.join(paper)}." if paper else ""
    return (
        f"Mean over {', '.join(TASKS[task] for task in tasks)}, {seeds} paired seeds a task, 95 % t intervals; "
        f"sign-flip test, p corrected for the family (Holm).{place}"
    )


def _stale(energies: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """What a basis' leading block holds of the gradient's energy at the first and at the last look, by model."""
    for model in dict.fromkeys(record["titles"]["model"] for record in energies):
        lines, kept = [], []
        for record in (one for one in energies if one["titles"]["model"] == model):
            first, last = record["steps"][0], record["steps"][-1]
            start, end = _in_block(first, "initial"), _in_block(last, "initial")
            fresh, other = _in_block(last, "refreshed"), _in_block(first, "stored")
            kept.append(end / start)
            name = TRAJECTORIES.get(record["run"]["trajectory"], record["run"]["trajectory"])
            lines.append(
                f"{record['titles']['task']}, {name}: {start:.2f} at step {first['step']}, {end:.2f} at step "
                f"{last['step']}, {fresh:.2f} if renewed there; a basis made under another head starts at {other:.2f}."
            )
        after = (
            f"Share of the gradient's energy in the leading block of the run's own basis, mean over {model}'s layers."
        )
        keeps = " to ".join(dict.fromkeys(f"{100 * share:.0f}" for share in (min(kept), max(kept))))
        title = f"How a basis ages on {model}: {keeps} % of its block’s energy is left at the last look"
        yield Finding(title, tuple(lines), f"{after} One seed a trajectory.")


def _in_block(step: Mapping[str, Any], space: str) -> float:
    return mean(layer["block"] for layer in step["spaces"][space])


def _loss(table: BuiltTable | None) -> Iterator[Finding]:
    """Validation loss of the decoder, lowest first."""
    rows = [row for row in _column(table, "Valid Loss") if row["ours_low"] is not None]
    if len(rows) < 2:
        return
    shares = {row["row"]: row for row in _column(table, "#Train params")}
    rows.sort(key=lambda row: row["ours"])
    lines = []
    for row in rows:
        share = shares.get(row["row"])
        trains = f", trains {format_value('#Train params', share['ours'])}" if share and share["ours"] else ""
        lines.append(f"{row['row']}: {_shown(row)} nats a token{trains}.")
    apart = rows[0]["ours_high"] < rows[1]["ours_low"]
    best = f"{rows[0]['row']} has the lowest validation loss" if apart else "no lowest validation loss stands apart"
    model, n = rows[0]["model"], rows[0]["n"]
    after = f"Table 6, {model}: mean over {n} seeds, 95 % t intervals; where two overlap, neither is said to be lower."
    yield Finding(f"Decoder: {best}", tuple(lines), after)


def _losses(decoder: Mapping[str, Any]) -> Iterator[Finding]:
    """Variants of the methods on the decoder, by validation loss."""
    for family in (one for one in decoder["comparison"]["families"] if one["name"] != "methods"):
        lines, apart = [], 0
        for pair in family["pairs"]:
            first, second, test = label(pair["first"]), label(pair["second"]), pair["mean"]
            apart += test["verdict"] != verdicts.NOT_SEPARATED
            verdict = test["verdict"].replace("first", first).replace("second", second)
            p = "" if test["p_holm"] is None else f" (p {p_value(test['p_holm'])})"
            lines.append(f"{first} − {second}: {interval(test['difference'], '+', 3)} nats, {verdict}{p}.")
        separated = f"{apart} of {len(lines)} pairs" if apart else "no pair"
        title = f"Decoder, {family['name']}: {separated} separated"
        seeds = max(pair["mean"]["pairs"] for pair in family["pairs"])
        after = (
            f"Validation loss of {decoder['title']} after fine-tuning the selected MLP matrices alone, {seeds} paired "
            "seeds, 95 % t intervals, paired t test, p corrected for the family (Holm)."
        )
        yield Finding(title, tuple(lines), after)


def _speed(table: BuiltTable | None) -> Iterator[Finding]:
    """Speed and peak memory in training over full fine-tuning's."""
    speeds = {row["row"]: row for row in _column(table, "Steps/Sec.") if row["row"].endswith(RATIO)}
    peaks = {row["row"]: row for row in _column(table, "Peak in training, MB") if row["row"].endswith(RATIO)}
    speeds = {name: row for name, row in speeds.items() if row["ours"] is not None}
    if not speeds or table is None:
        return
    faster = [name.removesuffix(RATIO) for name, row in speeds.items() if (row["ours_low"] or 0) > 1]
    title = f"Faster than full fine-tuning a step: {', '.join(faster) or 'no method'}"
    lines = []
    for name, row in sorted(speeds.items(), key=lambda item: -item[1]["ours"]):
        peak = peaks.get(name)
        memory = f", peak in training × {peak['ours']:.2f}" if peak and peak["ours"] is not None else ""
        lines.append(f"{name.removesuffix(RATIO)}: speed × {_shown(row)}{memory}.")
    model = next(iter(speeds.values()))["model"]
    warning = next((f" {note}" for note in table.notes if note.startswith("Warning")), "")
    after = f"Table 3, {model}: ratios to full fine-tuning on the same batches of one machine, 95 % intervals.{warning}"
    yield Finding(title, tuple(lines), after)


def _logs(logs: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """The authors' logs beside the printed averages, over the same tasks."""
    lines = []
    for entry in logs:
        tasks = {tuple(row["tasks"]) for row in entry["printed"].values()}
        parts = [
            f"{label(method)} {row['logs']['mean']:.2f} (printed {row['printed_same_tasks']:.2f})"
            for method, row in entry["printed"].items()
        ]
        over = " to ".join(str(count) for count in sorted({len(one) for one in tasks}))
        lines.append(f"{entry['title']}, {over} tasks: {', '.join(parts)}.")
    pairs = [pair for entry in logs for family in entry["comparison"]["families"] for pair in family["pairs"]]
    apart = sum(pair["mean"]["verdict"] != verdicts.NOT_SEPARATED for pair in pairs)
    title = f"The authors’ logs separate {apart or 'no'} of {len(pairs)} pairs of methods"
    after = "Mean of the tasks’ means over the logged seeds; printed: the mean of the printed cells of the same tasks."
    if lines:
        yield Finding(title, tuple(lines), after)


def _averages(averages: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    wrong = [one for one in averages if one["verdict"] == CONTRADICTED]
    cut = [one for one in averages if one["verdict"] == CUT_OFF]
    lines = []
    for one in wrong:
        where = f"Table {one['table']}, {one['row']}: printed {one['printed']}"
        lines.append(f"{where}, {_instead(one)}.")
    if cut:
        names = "; ".join(f"Table {one['table']}, {one['row']}" for one in cut)
        lines.append(f"Explained by digits cut off, not rounded: {names}.")
    title = f"{len(wrong)} of {len(averages)} printed averages do not follow from their rows"
    yield Finding(title, tuple(lines), "Beyond what rounding of cells and average, or cutting off, can explain.")


def _instead(one: Mapping[str, Any]) -> str:
    """What the row of a printed average gives."""
    if one["mean"] is not None:
        return f"its cells give {one['mean']:.2f}"
    low, high = one["implied"]
    other = f"; {one['twin']}, the same row, prints {one['twin_value']}" if one["twin"] else ""
    return f"so {', '.join(one['missing'])}, not printed here, would be {low:.1f} to {high:.1f}{other}"


def _exchange(exchange: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the cells that were asked about look exchanged between two methods."""
    asked = exchange["asked"]
    first, second = map(label, asked["methods"])
    cells = [
        one for one in exchange["cells"] if (one["model"], one["task"] in asked["tasks"]) == (asked["model"], True)
    ]
    lines, answers = [], []
    for one in cells:
        if one["evidence"] <= 0:
            answers.append("no")
        else:
            answers.append("yes" if one["p_holm"] <= verdicts.LEVEL else "not beyond chance")
        printed, logged = (", ".join(f"{value:.1f}" for value in one[key]) for key in ("printed", "logged"))
        lines.append(
            f"{TASKS[one['task']]}: printed {printed}; logs {logged}. Distance {one['distance']:.2f} as printed, "
            f"{one['distance_exchanged']:.2f} exchanged; p by chance {p_value(one['p_chance'])}, "
            f"{p_value(one['p_holm'])} corrected."
        )
    summary = "; ".join(f"{TASKS[one['task']]} {answer}" for one, answer in zip(cells, answers, strict=True))
    title = f"Are {PAPER_MODELS[asked['model']]}’s cells of {first} and {second} exchanged? {summary}"
    if lines:
        yield Finding(title, tuple(lines), f"Pairs of numbers: {first}, {second}.")


def _column(table: BuiltTable | None, column: str) -> list[Row]:
    rows = table.rows if table is not None else ()
    return [row for row in rows if row["column"] == column and row["verdict"] != verdicts.NOT_RUN]


def _shown(row: Row) -> str:
    value, low, high = (format_value(row["column"], row[name]) for name in ("ours", "ours_low", "ours_high"))
    return f"{value} [{low}, {high}]" if low else f"{value} [no interval]"
