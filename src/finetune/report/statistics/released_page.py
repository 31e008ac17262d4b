"""The sections of `statistics.md` on the printed cells: which are the logs', and whether two are exchanged."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.published import TASKS
from finetune.report.paper.layouts import METHODS, PAPER_MODELS
from finetune.report.paper.released_check import CUT, OTHER, ROUNDED, SEEDS
from finetune.report.statistics.markdown import label, p_value, table
from finetune.stats.verdicts import LEVEL


def cells_section(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which printed cells are the logs' mean as printed, by model and task.

    Args:
        cells: `cells` of the record.
    """
    counts = {match: sum(cell["match"] == match for cell in cells) for match in (ROUNDED, CUT, OTHER)}
    rounded = sum(cell["match"] == ROUNDED and not cell["cut_off"] for cell in cells)
    large = " and ".join(PAPER_MODELS[model] for model in SEEDS)
    lines = [
        f"Of {len(cells)} printed cells with logs, {counts[ROUNDED]} are the logs' mean rounded, {counts[CUT]} only if "
        f"it is cut off, {counts[OTHER]} neither: those come from other runs. {rounded} of the first would print "
        f"otherwise if cut off, so the cells are rounded. Logs of {large}: the three seeds of the released run script.",
        "",
    ]
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        for method in METHODS.values():
            own = {cell["task"]: cell for cell in cells if (cell["model"], cell["method"]) == (model, method)}
            if own:
                rows.append([PAPER_MODELS[model], label(method), *(_match(own.get(task)) for task in TASKS)])
    lines += table(["model", "method", *TASKS.values()], rows)
    return [*lines, "", "=: the logs' mean, rounded; otherwise printed minus logged, in points; -: nothing logged."]


def exchange_section(content: Mapping[str, Any]) -> list[str]:
    """Answer whether printed cells of two methods are exchanged.

    Args:
        content: The record.
    """
    exchange = content["exchange"]
    return [*_method(exchange), "", *_cells(exchange), "", *_chance(exchange), "", *_answer(content)]


def _match(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return "=" if cell["match"] == ROUNDED else f"{cell['printed'] - cell['mean']:+.2f}"


def _method(exchange: Mapping[str, Any]) -> list[str]:
    first, second = map(label, exchange["asked"]["methods"])
    return [
        f"Distance: sum of |printed - logged| of both cells, as printed and with the cells of {first} and {second} "
        "exchanged. Evidence: log-likelihood of exchanged minus as printed, in nats, normal means, one variance pooled "
        "over the four samples. An exchange fits better wherever print and logs order the methods differently. "
        "p by chance: how often evidence as large arises without an exchange if the methods do not differ (else less "
        "often), print and logs taken as independent runs; Holm: over all rows of this table. Deviations are the "
        "population's.",
    ]


def _cells(exchange: Mapping[str, Any]) -> list[str]:
    first, second = map(label, exchange["asked"]["methods"])
    rows = []
    for one in exchange["cells"]:
        printed = [
            f"{value:.1f}{'' if std is None else f' ± {std:.1f}'}"
            for value, std in zip(one["printed"], one["printed_std"], strict=True)
        ]
        logged = [f"{value:.2f} ± {std:.2f}" for value, std in zip(one["logged"], one["logged_std"], strict=True)]
        numbers = [f"{one[key]:.2f}" for key in ("distance", "distance_exchanged")]
        ps = [p_value(one[key]) for key in ("p_chance", "p_holm")]
        copies = f"{one['copies']}, exchanged {one['copies_exchanged']}"
        place = [PAPER_MODELS[one["model"]], TASKS[one["task"]]]
        rows.append([*place, *printed, *logged, *numbers, f"{one['evidence'] + 0.0:+.2f}", *ps, copies])
    head = ["model", "task", f"{first} printed", f"{second} printed", f"{first} logs", f"{second} logs"]
    more = ["distance", "exchanged", "evidence", "p by chance", "p (Holm)", "cells equal to the logs' mean"]
    return table([*head, *more], rows)


def _chance(exchange: Mapping[str, Any]) -> list[str]:
    counts = exchange["counts"]
    better, tasks = (sum(one[key] for one in counts) for key in ("better", "tasks"))
    parts = [
        f"{PAPER_MODELS[one['model']]}, {' and '.join(map(label, one['methods']))}: {one['better']} of {one['tasks']}"
        for one in counts
    ]
    return [
        "How often an exchange would fit better by chance: in half of the tasks if two methods do not differ, so in "
        f"none of these counts is the number of tasks itself a sign: {'; '.join(parts)}; all {better} of {tasks}."
        if all(one["p"] > LEVEL for one in counts)
        else "How often an exchange would fit better by chance: in half of the tasks if two methods do not differ. "
        f"Found: {'; '.join(parts)}; all {better} of {tasks}; least binomial p {min(one['p'] for one in counts):.2g}.",
    ]


def _answer(content: Mapping[str, Any]) -> list[str]:
    """A line for each task that was asked about or stands out, and what an exchange does to the averages."""
    exchange = content["exchange"]
    asked, pair = exchange["asked"], exchange["asked"]["methods"]
    first, second = map(label, pair)
    lines = []
    for one in exchange["cells"]:
        suspected = one["model"] == asked["model"] and one["task"] in asked["tasks"]
        if suspected or (one["evidence"] > 0 and one["p_chance"] <= LEVEL):
            lines.append(f"- {PAPER_MODELS[one['model']]} {TASKS[one['task']]}: {_verdict(one, content['cells'])}")
    names = " and ".join(TASKS[task] for task in asked["tasks"])
    moved = [
        f"{label(method)} {printed:.2f} -> {exchanged:.2f} (logs {logs:.2f})"
        for method, (printed, exchanged, logs) in exchange["averages"].items()
    ]
    gap = {name: exchange["averages"][pair[1]][i] - exchange["averages"][pair[0]][i] for i, name in enumerate("pxl")}
    lines.append(
        f"- {PAPER_MODELS[asked['model']]}, mean of the printed cells with {names} exchanged: {'; '.join(moved)}. "
        f"{second} - {first} goes from {gap['p']:+.2f} to {gap['x']:+.2f} points; the logs say {gap['l']:+.2f}."
    )
    return ["Answer", "", *lines]


def _verdict(one: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    distances = f"distance {one['distance']:.2f} as printed, {one['distance_exchanged']:.2f} exchanged"
    if one["evidence"] <= 0:
        return f"does not look exchanged ({distances})."
    numbers = f"{distances}, evidence {one['evidence']:.1f} nats, p by chance {p_value(one['p_chance'])}"
    corrected = f"{p_value(one['p_holm'])} corrected for {len(TASKS)} tasks and all models"
    verdict = "looks exchanged" if one["p_holm"] <= LEVEL else "fits better exchanged, but not beyond chance"
    parts = [f"{verdict} ({numbers}, {corrected})."]
    stds = [abs(math.log(p / q)) for p, q in _ratios(one, False)], [abs(math.log(p / q)) for p, q in _ratios(one, True)]
    if all(stds) and sum(stds[1]) >= sum(stds[0]):
        parts.append("Its printed deviations fit better as printed.")
    if one["copies_exchanged"] < 2:
        count = ("Neither", "Only one")[one["copies_exchanged"]]
        parts.append(f"{count} of the two cells is the other method's logged mean to the digit: the runs are others.")
    rest = [c for c in cells if (c["model"], c["task"]) == (one["model"], one["task"])]
    others = [c for c in rest if c["method"] not in one["methods"]]
    if others and all(c["match"] == OTHER for c in rest):
        names = ", ".join(f"{label(c['method'])} {c['printed'] - c['mean']:+.2f}" for c in others)
        parts.append(
            f"No method's cell of this task is the logs' ({names} points too), so new runs explain it as well."
        )
    return " ".join(parts)


def _ratios(one: Mapping[str, Any], exchanged: bool) -> list[tuple[float, float]]:
    logged = one["logged_std"][::-1] if exchanged else one["logged_std"]
    return [(p, q) for p, q in zip(one["printed_std"], logged, strict=True) if p and q]
