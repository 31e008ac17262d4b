"""A plan for a reader: tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.plan.throughput import CALCULATED, MEASURED, SCALED, UNKNOWN

MARKS = {MEASURED: "", SCALED: "~", CALCULATED: "*", UNKNOWN: "?"}


def plan_lines(plan: Mapping[str, Any], unplanned: Sequence[str]) -> list[str]:
    """The whole plan.

    Args:
        plan: of :func:`finetune.plan.estimate.plan_experiment`.
        unplanned: stages of the pipeline whose time is not estimated.
    """
    found = [f"{plan['experiment']}: what it needs", "", *_hours(plan), "", *_totals(plan)]
    if unplanned:
        found += ["Not estimated (minutes; judgments as long as the judge takes): " + ", ".join(unplanned) + "."]
    found += ["", *_memory(plan), "", *_disk(plan), *_judging(plan)]
    if plan["actual"]:
        found += ["", *_actual(plan)]
    return [*found, "", *_sources(plan)]


def _hours(plan: Mapping[str, Any]) -> list[str]:
    names = list(plan["cards"])
    rows = [["stage", "model", "method", "runs", "steps a run", "steps in all", "if stopped", *names]]
    for row in plan["stages"]:
        cells = [_marked(row["cards"][name]["seconds"], row["cards"][name]["kinds"]) for name in names]
        steps = [
            f"{row['longest']:,}",
            f"{row['steps']:,}",
            f"{row['steps_if_stopped']:,.0f}" if row["may_stop"] else "",
        ]
        rows.append([row["stage"], row["model"], row["method"], f"{row['runs']:,}", *steps, *cells])
    return [
        "Time by kind of card, AT MOST: no run stops early, no trial is pruned. (steps a run: of the longest task)",
        *aligned(rows, left=3),
        "No mark: from this model's and method's own measured speed on the card; ~ scaled by operations from what was "
        "measured there; * calculated: operations / (peak x utilisation), an assumption; ? not known.",
        "if stopped: steps if runs end where the authors' logged runs did (trials alike); blank: none were logged.",
    ]


def _totals(plan: Mapping[str, Any]) -> list[str]:
    rows = [["in all, start-up of cells and runs with it", *plan["cards"]]]
    for key, title in (
        ("hours", "hours, at most"),
        ("hours_if_stopped", "hours, if stopped where the authors' runs did"),
    ):
        rows.append([title, *(_number(total[key]) for total in plan["totals"].values())])
    rows.append(["price of an hour", *(_number(card["price"]) for card in plan["cards"].values())])
    if any(card["price"] is not None for card in plan["cards"].values()):
        currency = plan["currency"] or "no currency set"
        for key, title in (("money", "at most"), ("money_if_stopped", "if stopped")):
            rows.append([f"{currency}, {title}", *(_number(total[key]) for total in plan["totals"].values())])
        return aligned(rows)
    return [*aligned(rows), "No money: prices are not set (conf/plan.yaml, cards.<name>.price and currency)."]


def _memory(plan: Mapping[str, Any]) -> list[str]:
    cards = [name for name, card in plan["cards"].items() if card["memory"] is not None]
    rows = [["", "", "batch", *_COMPONENTS.values(), "peak", "trains", *cards]]
    for row in plan["memory"]:
        setup, parts = row["setup"], row["components"]
        batch = f"{setup['accumulation_steps']} x {setup['micro_batch']} x {setup['tokens']}"
        cells = [_gb(parts[key]) for key in _COMPONENTS] + [_gb(row["peak"]), f"{100 * row['share']:.3g} %"]
        rows.append([row["model"], row["method"], batch, *cells, *_fits(row, cards)])
    for row in plan["preparing"]:
        parts = row["components"]
        cells = [_gb(parts[key]) if key in parts else "" for key in _COMPONENTS]
        rows.append([row["model"], row["phase"], "", *cells, _gb(row["peak"]), "", *_fits(row, cards)])
    sizes = ", ".join(f"{name} {plan['cards'][name]['memory'] / 1e9:g}" for name in cards)
    first = {row["method"]: row["components"] for row in plan["memory"]}
    lazy = [name for name, parts in first.items() if parts["optimizer_state"] != parts["optimizer_state_first"]]
    return [
        "Peak memory, GB, at the largest batch of the search and the longest rows (backward passes x rows x tokens):",
        *aligned(rows, left=2),
        f"On the right: whether it fits, beside a reserve each; memory of the cards, GB: {sizes}.",
        *([f"State of {', '.join(lazy)}: with {100 * plan['touched']:.0f} % of the entries touched."] if lazy else []),
    ]


_COMPONENTS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer_state": "state",
    "bases": "bases",
    "activations": "activations",
    "selection": "selection",
    "folding": "folding",
    "snapshot": "snapshot",
}


def _fits(row: Mapping[str, Any], cards: Sequence[str]) -> list[str]:
    return ["yes" if row["fits"][card] else "NO" for card in cards]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _disk(plan: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan["disk"].items() if name != "total" and size)
    return [f"Disk in all, GB: {plan['disk']['total'] / 1e9:.1f} ({sizes or 'nothing'})"]


def _judging(plan: Mapping[str, Any]) -> list[str]:
    judging = plan["judging"]
    if not judging["calls"]:
        return []
    tokens = " and ".join(f"{count / 1e6:.1f} million {kind}" for kind, count in judging["tokens"].items())
    if judging["money"] is None:
        money = "no money: prices are not set (conf/plan.yaml, judge)"
    else:
        money = f"{judging['money']:.2f} {plan['currency'] or '(no currency set)'}"
    return [f"Judge: {judging['calls']:,} calls, about {tokens} tokens by assumption; {money}"]


def _actual(plan: Mapping[str, Any]) -> list[str]:
    rows = [["what it took", "", "", "on", "runs", "estimated", "actual", "actual / estimated", "steps", "peak, GB"]]
    for row in plan["actual"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        steps = f"{row['actual_steps'] / row['planned_steps']:.2f}" if row["actual_steps"] else ""
        peak = "" if row["actual_peak"] is None else f"{row['actual_peak'] / 1e9:.2f}"
        hours = [_time(row["estimated_seconds"]), _time(row["actual_seconds"])]
        ran = f"{row['runs']} of {row['of']}"
        rows.append(
            [row["stage"], row["model"], row["method"], row["card"] or "several", ran, *hours, ratio, steps, peak]
        )
    return [
        *aligned(rows, left=4),
        "Estimated: at most, for the runs that have records, without step times of this experiment's own runs. steps: "
        "made / planned. A search's evaluations and start-up are in its trials' times.",
    ]


def _sources(plan: Mapping[str, Any]) -> list[str]:
    used: dict[str, set[str]] = {}
    for row in plan["stages"]:
        for name, card in row["cards"].items():
            used.setdefault(name, set()).update(card["sources"])
    found = ["Sources of the rates:"]
    found += [f"  {name}: {'; '.join(sorted(sources))}" for name, sources in used.items()]
    grouped: dict[str, list[str]] = {}
    for what, source in plan["sources"].items():
        grouped.setdefault(source, []).append(what)
    found.append("Sources of the sizes:")
    return found + [f"  {source}: {_some(whats)}" for source, whats in grouped.items()]


def _some(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _marked(seconds: float | None, kinds: Sequence[str]) -> str:
    """A time with the mark of the least certain rate in it."""
    return MARKS[max(kinds, key=list(MARKS).index, default=MEASURED)] + ("" if seconds is None else _time(seconds))


def _time(seconds: float | None) -> str:
    """Seconds, minutes or hours, with the unit."""
    if seconds is None:
        return "-"
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if seconds >= u), (1, "s"))
    return f"{_number(seconds / unit)} {name}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as lines; the first columns to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
