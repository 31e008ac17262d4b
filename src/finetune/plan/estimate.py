"""The whole plan as numbers: work, hours by card, memory, disk, judging, and what was taken beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from finetune.methods import needs_bases
from finetune.plan.actual import Taken, taken
from finetune.plan.detectable import detectable_differences
from finetune.plan.experiment import Experiment
from finetune.plan.flops import Cost
from finetune.plan.throughput import Processor, Throughput, published_facts, recorded_facts
from finetune.plan.work import Work

CHECKPOINTS = 3  # of a run, two and one being written


def plan_experiment(experiment: Experiment, cards: Sequence[Processor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is printed; JSON values.

    The settings are those of ``conf/plan.yaml``.

    Raises:
        ValueError: on a configuration that a run would refuse, or sizes that are not known.
    """
    name, results = experiment.lists["name"], experiment.results
    speed = _throughput(experiment, cards, settings)
    rows = _stages(list(experiment.work()), cards, speed, settings["seconds"])
    given = settings["workers"] or experiment.lists.get("workers")
    workers = given if isinstance(given, int) else 1  # auto, and jobs of a cluster, are one a card
    memory = _memory(experiment)
    for row in (*memory, *(preparing := _preparing(experiment))):
        row["fits"] = {card.name: card.fits(row["peak"]) for card in cards}
    return {
        "experiment": name,
        "currency": settings["currency"],
        "cards": {card.name: {"memory": card.memory, "reserve": card.reserve, "price": card.price} for card in cards},
        "stages": rows,
        "workers": workers,
        "totals": _totals(rows, cards, workers),
        "memory": memory,
        "preparing": preparing,
        "touched": settings["touched"],
        "disk": _disk(experiment, memory),
        "detectable": detectable_differences(experiment, settings["detectable"]),
        "judging": _judging(experiment, settings),
        "actual": _beside(rows, taken(results, name, cards), cards),
        "sources": dict(sorted(experiment.sources.items())),
    }


def _throughput(experiment: Experiment, cards: Sequence[Processor], settings: Mapping[str, Any]) -> Throughput:
    facts = [*published_facts(), *recorded_facts(experiment.results, cards, experiment.lists["name"])]

    def cost(model: str, method: str, checkpointing: bool | None) -> Cost | None:
        try:
            return experiment.cost(model, method, checkpointing)
        except (FileNotFoundError, ValueError):  # a record of a model or method that is not in the configuration
            return None

    def kin(method: str) -> tuple[str, ...]:
        try:
            return experiment.kin(method)
        except (FileNotFoundError, ValueError):
            return (method,)

    return Throughput(facts, cost, experiment.tokens, settings, kin)


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
            row["jobs"] += piece.runs if piece.jobs is None else piece.jobs
        for card in cards:
            entry = row["cards"][card.name]
            for key, stopped in (("seconds", False), ("if_stopped", True)):
                found = piece.seconds(card, speed, stopped=stopped)
                entry[key] = None if found.value is None or entry[key] is None else entry[key] + found.value
                busy = found.value if found.busy is None else found.busy
                entry[f"busy_{key}"] += busy or 0.0
            entry["kinds"] = sorted({*entry["kinds"], found.kind})
            entry["sources"] = sorted({*entry["sources"], found.source})
    for row in rows.values():
        row["overhead"] += seconds["cell"]
    return list(rows.values())


def _empty(piece: Work, method: str, cards: Sequence[Processor]) -> dict[str, Any]:
    counts = {
        "runs": 0,
        "steps": 0,
        "steps_if_stopped": 0.0,
        "may_stop": False,
        "longest": 0,
        "overhead": 0.0,
        "jobs": 0,
    }
    seconds = {"seconds": 0.0, "if_stopped": 0.0, "busy_seconds": 0.0, "busy_if_stopped": 0.0}
    times = {card.name: seconds | {"kinds": [], "sources": []} for card in cards}
    return {"stage": piece.stage, "model": piece.model, "method": method, **counts, "cards": times}


def _totals(rows: Sequence[Mapping[str, Any]], cards: Sequence[Processor], workers: int) -> dict[str, Any]:
    """Hours and money of each card, one run at a time and ``workers``; start-up of cells and runs is in all."""
    found: dict[str, Any] = {}
    for card in cards:
        found[card.name] = {}
        for key, suffix in (("seconds", ""), ("if_stopped", "_if_stopped")):
            known = all(row["cards"][card.name][key] is not None for row in rows)
            for beside, count in (("", 1), ("_beside", workers)):
                hours = sum(_beside_each_other(row, card.name, key, count) for row in rows) / 3600 if known else None
                found[card.name][f"hours{beside}{suffix}"] = hours
            hours = found[card.name][f"hours_beside{suffix}"]
            found[card.name][f"money{suffix}"] = None if card.price is None or hours is None else card.price * hours
    return found


def _beside_each_other(row: Mapping[str, Any], card: str, key: str, workers: int) -> float:
    """Seconds of a stage whose runs share a card: a share of all of it, but no less than the card works."""
    entry, count = row["cards"][card], min(workers, row["jobs"]) if row["stage"] in ("search", "train") else 1
    alone = entry[key] + row["overhead"]
    return alone if count < 2 else max(alone / count, entry[f"busy_{key}"])


def _memory(experiment: Experiment) -> list[dict[str, Any]]:
    """Of every cell. An encoder's peak is a step's, as the allocator's was compared with it; a decoder's a run's."""
    found = []
    for entry in experiment.stages["train"].values():
        model, method = entry["model"], entry["method"]
        needed = experiment.memory(model, method)
        total = experiment.cost(model, method).parameters
        found.append(
            {
                "model": model,
                "method": method,
                "setup": asdict(experiment.setup(model, method)),
                "components": asdict(needed),
                "peak": needed.peak if entry["problem"] == "chat" else needed.step_peak,
                "share": needed.trained / total,
            }
        )
    return found


def _preparing(experiment: Experiment) -> list[dict[str, Any]]:
    """Memory of the phases before training, of models with a method that rotates gradients."""
    cells = experiment.stages["train"].values()
    rotated = dict.fromkeys(e["model"] for e in cells if needs_bases(experiment.method(e["method"])))
    return [
        {"model": model, "phase": phase, "components": parts, "peak": parts["peak"]}
        for model in rotated
        for phase, parts in experiment.preparing(model).items()
    ]


def _disk(experiment: Experiment, memory: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes that stay, and what a run holds while it lasts: each checkpoint the weights, the best ones, and the state.

    Checkpoints of a run are deleted when it ends, so the largest method's count once.
    """
    found: dict[str, float] = {"moments": 0, "bases": 0, "merged models": 0}
    for entry in experiment.stages["bases"].values():
        found["moments"] += len(entry["tasks"]) * experiment.moments(entry["model"])
    found["bases"] = found["moments"] // 2
    for entry, row in zip(experiment.stages["train"].values(), memory, strict=True):
        problem = experiment.problem(entry["model"], entry["method"])
        if problem.keeps_models:
            weights = experiment.cost(entry["model"], entry["method"]).parameters * problem.stored_dtype.itemsize
            found["merged models"] += weights * len(entry["seeds"])
        kind = f"checkpoints while {'a decoder' if entry['problem'] == 'chat' else 'an encoder'} trains"
        size = CHECKPOINTS * (2 * row["components"]["snapshot"] + row["components"]["optimizer_state"])
        found[kind] = max(found.get(kind, 0), size)
    return found | {"total": sum(found.values())}


def _judging(experiment: Experiment, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Calls, tokens by assumption, and money where prices are set (per million tokens)."""
    judge, cells = settings["judge"], experiment.stages["answers"].values()
    calls = sum(experiment.judge_calls(e["model"]) * len(e["methods"]) * len(e["seeds"]) for e in cells)
    tokens = {kind: calls * judge[f"{kind}_tokens"] for kind in ("prompt", "completion")}
    prices = {kind: judge[f"{kind}_price"] for kind in tokens}
    unknown = None in prices.values()
    money = None if unknown else sum(tokens[kind] * prices[kind] / 1e6 for kind in tokens)
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
        # Records that name no device (searches, bases) ran where the experiment's others did.
        devices = entry.devices or everywhere or {default}
        card = next(iter(devices)) if len(devices) == 1 else None
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
