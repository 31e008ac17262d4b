"""`statistics.md`: the record of the statistics (`statistics_record`) for readers."""

from collections.abc import Mapping
from typing import Any

from finetune.published import TASKS
from finetune.report.paper.k_notes import explain
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.report.paper.printed_averages import CONTRADICTED, CUT_OFF, FOLLOWS, IMPLAUSIBLE, UNDECIDED, AverageCheck
from finetune.report.statistics.markdown import interval, label, p_value, table
from finetune.report.statistics.released_page import cells_section, exchange_section
from finetune.stats.verdicts import LEVEL


def to_markdown(content: Mapping[str, Any]) -> str:
    """Render the record as a Markdown page.

    Args:
        content: As `build_statistics` gives it, or as read back from `statistics.json`.
    """
    lines = [f"# Statistics of the scores (experiment {content['experiment']}, protocol {content['protocol']})", ""]
    lines += _rules(content["settings"])
    if not content["runs"]:
        lines += ["", "## Our runs", "", "Nothing ran."]
    for entry in content["runs"]:
        lines += ["", f"## Our runs: {entry['title']} ({entry['model']})", "", *_place(entry)]
        lines += _comparison(entry["comparison"])
    if content["decoder"] is not None:
        lines += ["", *_decoder(content["decoder"])]
    for entry in content["logs"]:
        lines += ["", f"## The authors' released logs: {entry['title']}", ""]
        lines += ["Without the seed of their search; printed averages beside.", ""]
        lines += table(["", "printed AVG", "mean of the printed cells", "logs, same tasks", "tasks"], _printed(entry))
        lines += ["", *_comparison(entry["comparison"])]
    lines += ["", "## Printed averages against their rows", "", *_averages(content)]
    lines += ["", "## Printed cells against the logs", "", *cells_section(content["cells"])]
    lines += ["", "## Are printed cells exchanged between LoRA and SparseGrad?", "", *exchange_section(content)]
    return "\n".join(lines) + "\n"


def _rules(settings: Mapping[str, Any]) -> list[str]:
    return [
        "Scores are in percent on the validation split, differences in points, intervals at 95 %. Per task: t interval "
        "over seeds. AVG is the mean of the tasks' means and IQM the interquartile mean of all runs, each with a "
        f"stratified bootstrap over seeds ({settings['samples']:,} resamples, tasks fixed; rliable). With three to "
        "five seeds a percentile interval is somewhat too narrow, so decisions use the tests.",
        "",
        "Pairs are differences at equal task and seed. Test: two-sided sign flips of all (task, seed) pairs, all "
        f"patterns up to {settings['exact_pairs']} pairs, {10 * settings['samples']:,} drawn beyond. It asks nothing "
        "of the scores' distribution, and at three to five seeds no asymptotic test is calibrated. p is corrected by "
        "Holm over the pairs of a family (AVG), and over its pairs and tasks (single tasks). Least p is what so many "
        "pairs allow at all: where it exceeds 0.05 no data could separate the two. P(first > second) is rliable's "
        f"probability of improvement. An IQM needs {settings['least_for_iqm']} values; over raw scores it drops the "
        "easiest and the hardest tasks, so the IQM of differences says more.",
    ]


def _place(entry: Mapping[str, Any]) -> list[str]:
    paper = [PAPER_MODELS[name] for name in entry["stands_for"] if name != entry["model"]]
    facts = [f"In the place of {', '.join(paper)}; not the paper's model."] if paper else []
    scales = [scale for scale in entry["scales"] if scale != "paper"]
    facts += [f"Scale {', '.join(scales)}, not the paper's."] if scales else []
    facts += ["Started from random weights."] if entry["random_weights"] else []
    facts += [f"Failed runs left out: {', '.join(entry['failed'])}."] if entry["failed"] else []
    versions = entry["versions"]
    facts += [f"Mixed versions of the configuration: {', '.join(map(str, versions))}."] if len(versions) > 1 else []
    return [" ".join(facts), ""] if facts else []


def _decoder(found: Mapping[str, Any]) -> list[str]:
    """Losses of a decoder's runs, and their differences at equal seeds."""
    lines = [
        f"## Our runs on dialogues: {found['title']} ({found['model']})",
        "",
        "Best validation loss in nats a token, lower is better; t intervals over seeds. Differences are at equal "
        "seeds, with the paired t test, corrected by Holm over the family: few seeds separate nothing by sign flips, "
        "and the t test trusts that differences of losses are normal.",
        "",
    ]
    rows = [
        [label(name), interval(one["loss"], places=3), str(one["loss"]["n"]), f"{one['share']:.3f} %"]
        for name, one in found["methods"].items()
    ]
    lines += table(["", "loss", "seeds", "trained share of the model"], rows)
    for family in found["families"]:
        rows = []
        for pair in family["pairs"]:
            first, second = label(pair["first"]), label(pair["second"])
            ps = [p_value(pair[key]) if pair[key] is not None else "-" for key in ("p", "p_holm")]
            verdict = pair["verdict"].replace("first", first).replace("second", second)
            rows.append(
                [f"{first} - {second}", interval(pair["difference"], "+", 3), str(len(pair["seeds"])), *ps, verdict]
            )
        lines += ["", f"Differences of losses, family: {family['name']}", ""]
        lines += table(["", "difference", "seeds", "p", "p (Holm)", "verdict"], rows)
    return lines


def _printed(entry: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for method, row in entry["printed"].items():
        missing = f"{len(row['tasks'])} (without {', '.join(TASKS[task] for task in row['missing'])})"
        tasks = missing if row["missing"] else f"{len(row['tasks'])}"
        same = f"{row['printed_same_tasks']:.2f}"
        rows.append([label(method), f"{row['printed']:.1f}", same, interval(row["logs"]), tasks])
    return rows


def _comparison(comparison: Mapping[str, Any]) -> list[str]:
    methods = comparison["methods"]
    tasks = [task for task in TASKS if any(task in found["tasks"] for found in methods.values())]
    rows = []
    for name, found in methods.items():
        cells = [interval(found["tasks"].get(task)) for task in tasks]
        counts = sorted({one["n"] for one in found["tasks"].values()})
        seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        partial = "" if len(found["tasks"]) == len(tasks) else f" (over {len(found['tasks'])} tasks)"
        rows.append([label(name), interval(found["mean"]) + partial, interval(found["iqm"]), seeds, *cells])
    lines = table(["", "AVG", "IQM", "seeds", *(TASKS[task] for task in tasks)], rows)
    for family in comparison["families"]:
        lines += ["", f"Differences, family: {family['name']}", "", *_family(family)]
    return lines


def _family(family: Mapping[str, Any]) -> list[str]:
    rows, single = [], []
    tasks = [task for task in TASKS if any(task in pair["tasks"] for pair in family["pairs"])]
    for pair in family["pairs"]:
        name, test = f"{label(pair['first'])} - {label(pair['second'])}", pair["mean"]
        verdict = test["verdict"].replace("first", label(pair["first"])).replace("second", label(pair["second"]))
        if test["least"] > LEVEL:
            verdict += " (too few pairs)"
        numbers = [interval(test["difference"], "+"), interval(pair["bootstrap"], "+"), interval(pair["iqm"], "+")]
        ps = [p_value(test[key]) for key in ("p", "p_holm", "least")]
        unpaired = f", {pair['unpaired']} runs without partner" if pair["unpaired"] else ""
        pairs = f"{test['pairs']}{unpaired}"
        rows.append([name, *numbers, interval(pair["improvement"]), pairs, *ps, verdict])
        cells = []
        for task in tasks:
            found = pair["tasks"].get(task)
            ps = f"p {p_value(found['p'])}, Holm {p_value(found['p_holm'])}" if found else ""
            cells.append(f"{interval(found['difference'], '+')}, {ps}" if found else "-")
        single.append([name, *cells])
    head = ["", "AVG, t interval", "AVG, bootstrap", "IQM", "P(first > second)", "pairs"]
    lines = table([*head, "p", "p (Holm)", "least p", "verdict"], rows) if rows else []
    lines += ["", *table(["", *(TASKS[task] for task in tasks)], single)] if rows else []
    lost = [f"{label(first)} - {label(second)}" for first, second in family["left_out"]]
    return [*lines, *(["", f"No task and seed in common: {', '.join(lost)}."] if lost else [])]


def _averages(content: Mapping[str, Any]) -> list[str]:
    """The printed averages, what does not follow first."""
    checks = [AverageCheck(**found) for found in content["averages"]]
    lines = [
        "Found from the printed cells by interval arithmetic: what rounding of cells and average can explain follows; "
        "cutting off in place of rounding is told apart. Cells that the paper does not print are no evidence.",
    ]
    for verdict in (CONTRADICTED, IMPLAUSIBLE, CUT_OFF, UNDECIDED):
        found = [check for check in checks if check.verdict == verdict]
        lines += ["", f"{verdict.capitalize()}: {len(found)} of {len(checks)}.", ""] if found else []
        for check in found:
            text = explain(check).removeprefix(f"{verdict}: ")
            lines.append(f"- Table {check.table}, {check.row}: printed {check.printed}; {text}.")
    rest = sum(check.verdict == FOLLOWS for check in checks)
    lines += ["", f"Follows: {rest} of {len(checks)}."]
    repeated = [f"{row} repeats {other}" for row, other in content["repeated_rows"]]
    return [*lines, *(["", f"Rows printed twice, every score and deviation alike: {'; '.join(repeated)}."])]
