"""The whole plan as numbers: work, hours by card, memory, disk, judging, and what was taken beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from finetune.plan.actual import Taken, taken
from finetune.plan.decoder import Card, plan_model
from finetune.plan.experiment import Experiment
from finetune.plan.memory import Setup
from finetune.plan.throughput import Processor, Throughput, published_facts, recorded_facts
from finetune.plan.work import Work

CHECKPOINTS = 3  # of a run, two and one being written


def plan_experiment(experiment: Experiment, cards: Sequence[Processor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is printed; JSON values.

    Args:
        experiment: what is planned.
        cards: kinds of processors, the first with a memory limit is the one that decoders are itemised for.
        settings: ``utilisation``, ``touched``, ``questions``, ``turns``, ``judge``, ``currency`` and ``seconds`` of
            ``conf/plan.yaml``.

    Raises:
        ValueError: on a configuration that a run would refuse, or sizes that are not known.
    """
    name, results = experiment.lists["name"], experiment.results
    speed = _throughput(experiment, cards, settings["utilisation"])
    rows = _stages(list(experiment.work()), cards, speed, settings["seconds"])
    decoders = _decoders(experiment, cards, settings)
    memory = _memory(experiment, settings["touched"])
    found = {
        "experiment": name,
        "currency": settings["currency"],
        "cards": {card.name: {"memory": card.memory, "reserve": card.reserve, "price": card.price} for card in cards},
        "stages": rows,
        "totals": _totals(rows, cards),
        "memory": [row | {"fits": {c.name: c.fits(row["peak"]) for c in cards}} for row in memory],
        "models": decoders,
        "disk": _disk(experiment, memory, decoders),
        "judging": _judging(decoders, settings["judge"]),
        "actual": _beside(rows, taken(results, name, cards), cards),
        "sources": dict(sorted(experiment.sources.items())),
    }
    return found


def _throughput(experiment: Experiment, cards: Sequence[Processor], utilisation: Mapping[str, float]) -> Throughput:
    facts = [*published_facts(), *recorded_facts(experiment.results, cards, experiment.lists["name"])]

    def cost(model: str, method: str) -> Any:
        try:
            return experiment.cost(model, method)
        except FileNotFoundError:  # a record of a model or method that the configuration has no more
            return None

    return Throughput(facts, cost, experiment.tokens, utilisation)


def _stages(
    work: Sequence[Work], cards: Sequence[Processor], speed: Throughput, seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each stage, model and method, tasks summed up."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for piece in work:
        method = "" if piece.stage in ("efficiency", "gradients") else piece.method
        row = rows.setdefault((piece.stage, piece.model, method), _empty(piece, method, cards))
        if not piece.inside:
            row["runs"] += piece.runs
            row["steps"] += piece.runs * piece.steps
            row["steps_if_stopped"] += piece.runs * (piece.steps if piece.stopped is None else piece.stopped)
            row["may_stop"] |= piece.stopped is not None
            row["longest"] = max(row["longest"], piece.steps)
            row["overhead"] += piece.runs * seconds["run"]
        for card in cards:
            entry = row["cards"][card.name]
            whole, kind, source = piece.seconds(card, speed)
            stopped = piece.seconds(card, speed, stopped=True)[0]
            entry["seconds"] = None if whole is None or entry["seconds"] is None else entry["seconds"] + whole
            entry["if_stopped"] = None if stopped is None or entry["seconds"] is None else entry["if_stopped"] + stopped
            entry["kinds"] = sorted({*entry["kinds"], kind})
            entry["sources"] = sorted({*entry["sources"], source})
    for row in rows.values():
        row["overhead"] += seconds["cell"]
    return list(rows.values())


def _empty(piece: Work, method: str, cards: Sequence[Processor]) -> dict[str, Any]:
    return {
        "stage": piece.stage,
        "model": piece.model,
        "method": method,
        "runs": 0,
        "steps": 0,
        "steps_if_stopped": 0.0,
        "may_stop": False,
        "longest": 0,
        "overhead": 0.0,
        "cards": {c.name: {"seconds": 0.0, "if_stopped": 0.0, "kinds": [], "sources": []} for c in cards},
    }


def _totals(rows: Sequence[Mapping[str, Any]], cards: Sequence[Processor]) -> dict[str, Any]:
    """Hours and money of each card; start-up of cells and runs is in both."""
    found, overhead = {}, sum(row["overhead"] for row in rows) / 3600
    for card in cards:
        hours = {}
        for key in ("seconds", "if_stopped"):
            values = [row["cards"][card.name][key] for row in rows]
            hours[key] = None if any(value is None for value in values) else sum(values) / 3600 + overhead
        priced = None if card.price is None else card.price
        found[card.name] = {
            "hours": hours["seconds"],
            "hours_if_stopped": hours["if_stopped"],
            "money": None if priced is None or hours["seconds"] is None else priced * hours["seconds"],
            "money_if_stopped": None if priced is None or hours["if_stopped"] is None else priced * hours["if_stopped"],
        }
    return found


def _memory(experiment: Experiment, touched: float) -> list[dict[str, Any]]:
    """Of every encoder and method at the largest batch that its search may try, and the longest rows."""
    found, seen = [], set()
    for model, method in experiment.cells():
        if (model, method) in seen:
            continue
        seen.add((model, method))
        protocol, scale, group = experiment.protocol, experiment.scale, experiment.model(model)
        points = [point["batch_size"] for point in scale["search"]["points"]]
        rows = max([*points, scale["batch_size"]] if len(points) >= scale["search"]["trials"]
                   else [*points, *protocol["search"]["batch_sizes"]])  # fmt: skip
        tokens = min(protocol["max_length"], group["architecture"].get("max_position_embeddings", 10**9))
        precision = scale["precision"] or protocol["precision"]
        needed = experiment.memory(model, method, Setup(rows, tokens, precision=precision, touched=touched))
        found.append({"model": model, "method": method, "rows": rows, "tokens": tokens, "components": asdict(needed)}
                     | {"peak": needed.step_peak})  # fmt: skip
    return found


def _decoders(experiment: Experiment, cards: Sequence[Processor], settings: Mapping[str, Any]) -> dict[str, Any]:
    lists = experiment.lists
    limited = next((card for card in cards if card.memory is not None), None)
    if not lists.get("decoders") or limited is None:
        return {}
    methods = lists["methods"]
    found = {}
    for name in lists["decoders"]:
        plan = plan_model(
            experiment.model(name),
            {method: experiment.method(method) for method in methods},
            experiment.chat_protocol,
            experiment.chat_scale,
            seeds=len(lists.get("decoder_seeds") or lists["seeds"]),
            questions=settings["questions"],
            turns=settings["turns"],
            touched=settings["touched"],
            card=Card(limited.name, limited.memory or 0, limited.reserve),
            compared={m: experiment.method(m) for m in settings["compared"] if m not in methods},
        )
        for memory in plan["training"].values():
            memory["fits_each"] = {card.name: card.fits(memory["peak"]) for card in cards}
        found[name] = plan
    return found


def _disk(experiment: Experiment, memory: Sequence[Mapping[str, Any]], decoders: Mapping[str, Any]) -> dict[str, float]:
    """Bytes that stay, and what a run holds while it lasts."""
    tasks = len(experiment.lists.get("tasks") or ())
    moments = 0
    for model in experiment.lists.get("models") or ():
        moments += tasks * sum(8 * (o * o + i * i) for o, i in experiment.shapes(model).values())
    run = [CHECKPOINTS * (2 * row["components"]["snapshot"] + row["components"]["optimizer_state"]) for row in memory]
    found: dict[str, float] = {
        "moments of encoders": moments,
        "bases of encoders": moments // 2,
        "checkpoints while an encoder trains": max(run, default=0),
    }
    for name, plan in decoders.items():
        found |= {f"{kind} of {name}": size for kind, size in plan["disk"].items() if kind != "total"}
    return found | {"total": sum(found.values())}


def _judging(decoders: Mapping[str, Any], judge: Mapping[str, Any]) -> dict[str, Any]:
    """Calls, tokens by assumption, and money where prices are set (per million tokens)."""
    calls = sum(plan["judging"]["calls"] for plan in decoders.values())
    tokens = {kind: calls * judge[f"{kind}_tokens"] for kind in ("prompt", "completion")}
    prices = {kind: judge[f"{kind}_price"] for kind in tokens}
    money = None
    if all(price is not None for price in prices.values()):
        money = sum(tokens[kind] * prices[kind] / 1e6 for kind in tokens)
    return {"calls": calls, "tokens": tokens, "money": money}


def _beside(
    rows: Sequence[Mapping[str, Any]], found: Mapping[tuple[str, str, str], Taken], cards: Sequence[Processor]
) -> list[dict[str, Any]]:
    """Estimate and actual of every row that has records, on the card that they name (``CPU`` where they name none)."""
    compared = []
    default = next((card.name for card in cards if card.match == "cpu"), None)
    everywhere = {name for entry in found.values() for name in entry.devices}
    for row in rows:
        entry = found.get((row["stage"], row["model"], row["method"]))
        if entry is None:
            continue
        devices = entry.devices or everywhere or {default}
        card = next(iter(devices)) if len(devices) == 1 else None
        # Records that name no device (searches, bases) ran where the experiment's others did.
        part = entry.runs / row["runs"] if row["runs"] else 0.0
        planned = None if card is None else row["cards"][card]["seconds"]
        compared.append(
            {
                "stage": row["stage"],
                "model": row["model"],
                "method": row["method"],
                "card": card,
                "runs": entry.runs,
                "of": row["runs"],
                "estimated_seconds": None if planned is None else planned * part,
                "actual_seconds": entry.seconds,
                "ratio": None if not planned or not part else entry.seconds / (planned * part),
                "planned_steps": row["steps"] * part,
                "actual_steps": entry.steps,
                "actual_peak": entry.peak,
            }
        )
    return compared
