"""The statistics on the page, as grids over the fields of `statistics.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.report.labels import Labels
from finetune.report.page.blocks import Block, Grid, Heading, Items, Paragraph
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.report.paper.printed_averages import FOLLOWS
from finetune.report.paper.released_check import ROUNDED
from finetune.report.statistics.families import METHODS
from finetune.report.statistics.markdown import interval as spaced
from finetune.report.statistics.markdown import p_value
from finetune.stats import verdicts


def statistics_blocks(content: Mapping[str, Any], labels: Labels) -> Iterator[Block]:
    """All that the record of the statistics holds, our runs first.

    Args:
        content: Of `statistics.json`.
        labels: Of methods and tasks.
    """
    for place, entry in enumerate(content["runs"], 1):
        yield Heading(f"statistics-runs-{place}", f"Our runs: {entry['title']}")
        yield from _comparison(entry["comparison"], labels)
    for place, entry in enumerate(content["decoders"], 1):
        yield Heading(f"statistics-decoder-{place}", f"Our runs on dialogues: {entry['title']}")
        yield from _decoder(entry, labels)
    for entry in content["logs"]:
        yield Heading(f"statistics-logs-{entry['model'].replace('_', '-')}", f"The authors’ logs: {entry['title']}")
        yield _printed(entry, labels)
        yield from _comparison(entry["comparison"], labels)
    yield Heading("statistics-averages", "Printed averages against their rows")
    yield _averages(content["averages"])
    yield Heading("statistics-cells", "Printed cells against the logs")
    yield Paragraph("“=”: the logs’ mean, rounded as printed; otherwise printed minus logged, in points.", "lead")
    yield _cells(content["cells"], labels)
    yield Heading("statistics-exchange", "Are printed cells exchanged?")
    yield from _exchange(content["exchange"], labels)
    yield Heading("statistics-rules", "Rules")
    yield Items(_rules(content["settings"]))


def pair_name(pair: Mapping[str, Any], labels: Labels) -> str:
    """The two methods of a difference."""
    return f"{labels.method(pair['first'])} − {labels.method(pair['second'])}"


def said(verdict: str, pair: Mapping[str, Any], labels: Labels) -> str:
    """A verdict on a pair with the better one's name."""
    better = {verdicts.FIRST_BETTER: "first", verdicts.SECOND_BETTER: "second"}.get(verdict)
    return f"{labels.method(pair[better])} is better" if better else verdict


def family_title(family: Mapping[str, Any], labels: Labels) -> str:
    """Name of a family for readers, such as "variants of SparseGrad"."""
    return f"{family['kind']} {labels.method(family['of'])}" if family["of"] else family["kind"]


def _comparison(comparison: Mapping[str, Any], labels: Labels) -> Iterator[Grid]:
    methods = comparison["methods"]
    tasks = labels.in_order({task for found in methods.values() for task in found["tasks"]})
    rows = []
    for name, found in methods.items():
        counts = [one["n"] for one in found["tasks"].values()]
        seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
        partial = "" if len(found["tasks"]) == len(tasks) else f" (over {len(found['tasks'])} of {len(tasks)} tasks)"
        cells = [interval(found["tasks"].get(task)) for task in tasks]
        rows.append([labels.method(name), interval(found["mean"]) + partial, interval(found["iqm"]), seeds, *cells])
    head = ["method", "AVG", "IQM", "seeds", *_titles(tasks, labels)]
    yield Grid("Means with 95 % intervals, in percent", head, rows)
    for family in comparison["families"]:
        yield from _family(family, labels)


def _family(family: Mapping[str, Any], labels: Labels) -> Iterator[Grid]:
    """The differences of the means, then of single tasks."""
    pairs, title = family["pairs"], family_title(family, labels)
    tasks = labels.in_order({task for pair in pairs for task in pair["tasks"]})
    rows, single = [], []
    for pair in pairs:
        name, test = pair_name(pair, labels), pair["mean"]
        few = " (too few pairs)" if test["least"] > verdicts.LEVEL else ""
        unpaired = f", {pair['unpaired']} runs without partner" if pair["unpaired"] else ""
        numbers = [interval(found, "+") for found in (test["difference"], pair["bootstrap"], pair["iqm"])]
        ps = [p_value(test[key]) for key in ("p", "p_holm", "least")]
        verdict = said(test["verdict"], pair, labels) + few
        rows.append([name, verdict, *numbers, interval(pair["improvement"]), f"{test['pairs']}{unpaired}", *ps])
        single.append([name, *(_single(pair["tasks"].get(task)) for task in tasks)])
    if rows:
        head = ["pair", "verdict", "AVG, t interval", "AVG, bootstrap", "IQM", "P(first > second)", "pairs", "p"]
        yield Grid(f"Differences in points: {title}", [*head, "p (Holm)", "least p"], rows)
        if family["kind"] == METHODS:
            yield Grid(f"Single tasks: {title}", ["pair", *_titles(tasks, labels)], single)


def _single(test: Mapping[str, Any] | None) -> str:
    return f"{interval(test['difference'], '+')}, Holm {p_value(test['p_holm'])}" if test else "–"


def _decoder(entry: Mapping[str, Any], labels: Labels) -> Iterator[Grid]:
    methods = sorted(entry["comparison"]["methods"].items(), key=lambda item: item[1]["mean"]["mean"])
    rows = []
    for name, found in methods:
        [loss] = found["tasks"].values()
        rows.append([labels.method(name), interval(loss, places=3), str(loss["n"]), f"{entry['shares'][name]:.3f} %"])
    caption = "Best validation loss in nats a token, lower is better, with 95 % t intervals"
    yield Grid(caption, ["method", "loss", "seeds", "trained share of the model"], rows)
    for family in entry["comparison"]["families"]:
        rows = [
            [
                pair_name(pair, labels),
                said(pair["mean"]["verdict"], pair, labels),
                interval(pair["mean"]["difference"], "+", 3),
                str(pair["mean"]["pairs"]),
                *(p_value(pair["mean"][key]) for key in ("p", "p_holm")),
            ]
            for pair in family["pairs"]
        ]
        caption = f"Differences of losses, paired t test: {family_title(family, labels)}"
        yield Grid(caption, ["pair", "verdict", "difference", "seeds", "p", "p (Holm)"], rows)


def _printed(entry: Mapping[str, Any], labels: Labels) -> Grid:
    rows = []
    for method, row in entry["printed"].items():
        missing = f" (without {', '.join(_titles(row['missing'], labels))})" if row["missing"] else ""
        numbers = [f"{row['printed']:.1f}", f"{row['printed_same_tasks']:.2f}", interval(row["logs"])]
        rows.append([labels.method(method), *numbers, f"{len(row['tasks'])}{missing}"])
    head = ["method", "printed AVG", "mean of the printed cells", "logs, same tasks", "tasks"]
    return Grid("Printed averages beside the logs’", head, rows)


def _averages(averages: Sequence[Mapping[str, Any]]) -> Grid:
    """What does not follow, first."""
    rows = [
        [
            f"Table {one['table']}, {one['row']}",
            one["printed"],
            "–" if one["mean"] is None else f"{one['mean']:.2f}",
            one["verdict"],
            one["twin"] or "–",
        ]
        for one in sorted(averages, key=lambda one: one["verdict"] == FOLLOWS)
    ]
    head = ["row", "printed", "mean of its cells", "verdict", "printed again in"]
    return Grid("Printed averages and what rounding of cells and average can explain", head, rows)


def _cells(cells: Sequence[Mapping[str, Any]], labels: Labels) -> Grid:
    tasks = labels.in_order({cell["task"] for cell in cells})
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for cell in cells:
        shown = "=" if cell["match"] == ROUNDED else f"{cell['printed'] - cell['mean']:+.2f}"
        lines.setdefault((cell["model"], cell["method"]), {})[cell["task"]] = shown
    rows = [
        [PAPER_MODELS[model], labels.method(method), *(found.get(task, "no log") for task in tasks)]
        for (model, method), found in lines.items()
    ]
    return Grid("Printed cells against the logs", ["model", "method", *_titles(tasks, labels)], rows, quiet=True)


_FORMS = {"printed": ".1f", "logged": ".2f"}


def _exchange(exchange: Mapping[str, Any], labels: Labels) -> Iterator[Block]:
    first, second = map(labels.method, exchange["asked"]["methods"])
    rows = []
    for one in exchange["cells"]:
        pairs = [" / ".join(f"{value:{form}}" for value in one[key]) for key, form in _FORMS.items()]
        numbers = [f"{one[key]:.2f}" for key in ("distance", "distance_exchanged")]
        ps = [p_value(one[key]) for key in ("p_chance", "p_holm")]
        place = f"{PAPER_MODELS[one['model']]}, {labels.task(one['task'])}"
        rows.append([place, *pairs, *numbers, f"{one['evidence'] + 0.0:+.2f}", *ps])
    head = ["cells", "printed", "logs", "distance", "exchanged", "evidence, nats", "p by chance", "p (Holm)"]
    yield Grid(f"{first} / {second}, as printed and exchanged", head, rows)
    counts = exchange["counts"]
    better, tasks = (sum(one[key] for one in counts) for key in ("better", "tasks"))
    yield Paragraph(
        f"By chance an exchange fits better in half of the tasks if two methods do not differ; here, over all pairs of "
        f"methods, in {better} of {tasks}, least binomial p {p_value(min(one['p'] for one in counts))}.",
        "lead",
    )


def _rules(settings: Mapping[str, Any]) -> list[str]:
    return [
        "Scores are in percent on the validation split, differences in points, intervals at 95 %. AVG is the mean of "
        "the tasks’ means, IQM the interquartile mean of all runs, each with a stratified bootstrap over seeds "
        f"({settings['samples']:,} resamples).",
        "Pairs are differences at equal task and seed. Test: two-sided sign flips of all pairs, all patterns up to "
        f"{settings['exact_pairs']} pairs, {10 * settings['samples']:,} drawn beyond; p is corrected by Holm over a "
        f"family. Least p is what so many pairs allow at all: above {settings['level']} no data could separate.",
        "Losses of a decoder have the paired t test: few seeds separate nothing by sign flips.",
        "An exchange: evidence is the log-likelihood of exchanged minus as printed; p by chance says how often it is "
        "as large without an exchange if the methods do not differ.",
    ]


def interval(estimate: Mapping[str, Any] | None, sign: str = "", places: int = 2) -> str:
    """An estimate with its interval, which no line break cuts."""
    return spaced(estimate, sign, places).replace(", ", ",\N{NO-BREAK SPACE}")


def _titles(tasks: Sequence[str], labels: Labels) -> list[str]:
    return [labels.task(task) for task in tasks]
