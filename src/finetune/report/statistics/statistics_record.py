"""Everything about scores that the paper does not print, as one JSON record: `statistics.json`.

Our runs and the authors' released logs go through the same functions (`method_comparison`); the printed averages are
held against their rows (`printed_averages`), the printed cells against the logs (`released_check`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import numpy as np

from finetune.published import TASKS
from finetune.report.evidence.evidence import Evidence
from finetune.report.paper import printed_averages, released_check
from finetune.report.paper.layouts import GLUE_TABLES, METHODS, PAPER_MODELS, PAPER_RUNS, printed_places
from finetune.report.statistics import method_comparison
from finetune.report.statistics.equivalence import build_equivalence
from finetune.report.statistics.families import Design
from finetune.stats import paired, verdicts

ASKED = {"model": "bert_base", "methods": ("lora", "sparsegrad"), "tasks": ("mrpc", "rte")}
"""The exchange that `docs/protocol.md`'s row D15 suspects; the answer looks at every task and model all the same."""


def build_statistics(evidence: Evidence, design: Design) -> dict[str, Any]:
    """Compute the statistics of an experiment.

    Returns:
        JSON values: among them `methods` and `tasks` (name -> label, tasks in the order of columns), `runs` (one entry
        a model), `decoders` (likewise, of losses), `logs` (one a model with logs), `averages` (the printed ones),
        `average_counts` (verdict -> number of distinct rows) and `cells` (printed against logs); `equivalence` where
        records hold predictions.
    """
    averages = printed_averages.check_averages()
    named = {*METHODS.values(), *(method for _, method, _ in evidence.runs)}
    ran = dict.fromkeys(model for model, _, _ in evidence.runs)
    logged = [cell for model in GLUE_TABLES for cell in released_check.printed_cells(model)]
    content = {
        "schema": 2,
        "experiment": evidence.experiment.name,
        "protocol": evidence.experiment.protocol,
        "settings": {
            "seed": design.seed,
            "samples": design.samples,
            "confidence": verdicts.CONFIDENCE,
            "level": verdicts.LEVEL,
            "exact_pairs": paired.EXACT_PAIRS,
            "least_for_iqm": paired.LEAST_FOR_IQM,
            "paper_runs": PAPER_RUNS,
            "seeds_of_logs": released_check.SEEDS,
        },
        "methods": {name: facts.label for name, facts in design.labels.methods.items() if name in named},
        "tasks": design.labels.tasks,
        "runs": [_own(evidence, model, design) for model in ran if model not in evidence.decoders],
        "decoders": [_decoder(evidence, model, design) for model in evidence.decoders if model in ran],
        "logs": [_logged(model, design) for model in GLUE_TABLES],
        "averages": averages,
        "average_counts": printed_averages.counts(averages),
        "cells": [asdict(cell) | {"mean": cell.mean, "std": cell.std} for cell in logged],
        "cell_counts": released_check.counts(logged),
        "exchange": _exchange(design.seed),
    }
    tested = build_equivalence(evidence, design)
    return plain(content | ({"equivalence": tested} if tested else {}))


def plain(value: Any) -> Any:
    """Turn dataclasses and tuples into JSON values; an infinity, which JSON has not, into `None`."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(found) for key, found in value.items()}
    if isinstance(value, list | tuple):
        return [plain(found) for found in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _own(evidence: Evidence, model: str, design: Design) -> dict[str, Any]:
    """The comparison of one model's runs, and where they are."""
    runs = [run for (name, _, _), found in evidence.runs.items() if name == model for run in found]
    scores = method_comparison.scores_of_runs(evidence, model)
    return {
        "model": model,
        "title": runs[0].title,
        "stands_for": [paper for paper, own in evidence.experiment.stands_for.items() if own == model],
        "scales": sorted({run.scale for run in runs}),
        "versions": sorted({run.version for run in runs}),
        "random_weights": any(run.random_weights for run in runs),
        "comparison": method_comparison.compare_methods(scores, design),
        "failed": [path for (name, _, _), paths in evidence.failed.items() if name == model for path in paths],
        "records": sorted(run.path for run in runs),
    }


def _decoder(evidence: Evidence, model: str, design: Design) -> dict[str, Any]:
    """The comparison of a decoder's losses, and the trained shares of the model in percent."""
    runs = {method: found for (name, method, _), found in evidence.runs.items() if name == model}
    every = [run for found in runs.values() for run in found]
    scores = method_comparison.scores_of_runs(evidence, model)
    return {
        "model": model,
        "title": every[0].title,
        "comparison": method_comparison.compare_methods(scores, design, losses=True),
        "shares": {method: found[0].share for method, found in runs.items()},
        "records": sorted(run.path for run in every),
    }


def _logged(model: str, design: Design) -> dict[str, Any]:
    """The comparison of the authors' logs of one model, and the printed averages beside theirs."""
    scores = method_comparison.scores_of_logs(model)
    comparison = method_comparison.compare_methods(scores, replace(design, peers=tuple(scores)))
    table = [cell for cell in printed_places(GLUE_TABLES[model]) if cell.method in scores]
    printed = {cell.method: float(cell.paper) for cell in table if cell.quantity == "average"}
    rows = {}
    for method, tasks in scores.items():
        own = {cell.task: float(cell.paper) for cell in table if cell.method == method and cell.task}
        rows[method] = {
            "printed": printed[method],
            "printed_same_tasks": float(np.mean([own[task] for task in tasks])),
            "logs": comparison.methods[method].mean,
            "tasks": list(tasks),
            "missing": [task for task in TASKS if task not in tasks],
        }
    return {"model": model, "title": PAPER_MODELS[model], "printed": rows, "comparison": comparison}


def _exchange(seed: int) -> dict[str, Any]:
    """Whether printed cells of two methods look exchanged: every task, every model, and how often chance does it."""
    model, pair = ASKED["model"], ASKED["methods"]
    return {
        "asked": ASKED,
        "cells": released_check.exchanges(pair, seed=seed),
        "counts": released_check.exchange_counts(),
        "averages": released_check.averages_with(ASKED["tasks"], model, pair),
    }
