"""Build tables of the paper, as JSON, CSV, Markdown and LaTeX, from an experiment's records.

python experiments/table.py number=9 name=local
python experiments/table.py number=[3,7,8] name=local
python experiments/table.py number=all name=local questions=mt_bench_inf
"""

import logging
from pathlib import Path
from typing import Any

from finetune.mt_bench.questions import load_questions
from finetune.mt_bench.scores import categories_of
from finetune.report.evidence.efficiency_evidence import read_efficiency_evidence
from finetune.report.evidence.evidence import read_evidence
from finetune.report.evidence.experiment import load_experiment
from finetune.report.tables.render import write_files
from finetune.report.tables.tables import build_table
from finetune.runs.command import script

log = logging.getLogger(__name__)


@script("table")
def main(config: dict[str, Any]) -> None:
    results = Path("results") / config["name"]
    experiment = load_experiment(config["experiment"], config["name"])
    numbers = experiment.tables if config["number"] == "all" else config["number"]
    evidence, measured = read_evidence(experiment, results), read_efficiency_evidence(experiment, results)
    categories = _categories(config.get("questions"))
    for number in [numbers] if isinstance(numbers, int) else numbers:
        table = build_table(number, evidence, measured, categories=categories)
        for path in write_files(results / "tables", table):
            log.info("%s", path)


def _categories(place: dict[str, Any] | None) -> dict[int, str] | None:
    if place is None:
        return None
    return categories_of(load_questions(Path(place["root"]) / place["folder"] / place["questions"]))


if __name__ == "__main__":
    main()
