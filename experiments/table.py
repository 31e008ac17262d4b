"""Build tables of the paper, as JSON, CSV, Markdown and LaTeX, from an experiment's records.

python experiments/table.py number=9 name=local
python experiments/table.py number=[3,7,8] name=local
python experiments/table.py number=steps name=paper experiment=experiments/paper.yaml
python experiments/table.py number=all name=local questions=mt_bench_inf
"""

import logging
from pathlib import Path
from typing import Any

from finetune.mt_bench.questions import load_questions
from finetune.mt_bench.scores import categories_of
from finetune.report.evidence.efficiency_evidence import read_efficiency_evidence
from finetune.report.evidence.evidence import read_evidence
from finetune.report.evidence.experiment import Experiment, load_experiment
from finetune.report.evidence.step_evidence import read_steps
from finetune.report.model import Table
from finetune.report.tables.render import write_files
from finetune.report.tables.steps import build_step_tables
from finetune.report.tables.tables import build_table
from finetune.runs.command import script

log = logging.getLogger(__name__)


@script("table")
def main(config: dict[str, Any]) -> None:
    results = Path("results") / config["name"]
    experiment = load_experiment(config["experiment"], config["name"])
    wanted = config["number"]
    tables = [] if wanted == "steps" else _of_the_paper(wanted, experiment, results, config.get("questions"))
    if wanted in ("all", "steps"):
        own = build_step_tables(read_steps(results), experiment)
        if wanted == "steps" and not own:
            raise ValueError(f"{results} holds no step in a graph, of before or of a decoder: see docs/hardware.md.")
        tables += own
    for table in tables:
        for path in write_files(results / "tables", table):
            log.info("%s", path)


def _of_the_paper(wanted: Any, experiment: Experiment, results: Path, questions: dict[str, Any] | None) -> list[Table]:
    numbers = experiment.tables if wanted == "all" else [wanted] if isinstance(wanted, int) else wanted
    evidence, measured = read_evidence(experiment, results), read_efficiency_evidence(experiment, results)
    categories = _categories(questions)
    return [build_table(number, evidence, measured, categories=categories) for number in numbers]


def _categories(place: dict[str, Any] | None) -> dict[int, str] | None:
    if place is None:
        return None
    return categories_of(load_questions(Path(place["root"]) / place["folder"] / place["questions"]))


if __name__ == "__main__":
    main()
