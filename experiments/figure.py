"""Draw figures from an experiment's records: for each an SVG, a PNG, and a JSON of its title, caption and notes.

python experiments/figure.py figure=figure_02 name=local
python experiments/figure.py figure=all name=local     # those that the experiment lists, in one process
python experiments/figure.py figure=figure_steps name=paper experiment=experiments/paper.yaml
"""

import logging
from pathlib import Path
from typing import Any

from finetune.report.evidence.efficiency_evidence import read_efficiency_evidence
from finetune.report.evidence.experiment import Experiment, load_experiment
from finetune.report.evidence.step_evidence import read_steps
from finetune.report.figures.energy_evidence import PAPER_MODEL, read_looks
from finetune.report.figures.energy_figure import draw_figure_energy
from finetune.report.figures.figures_efficiency import draw_figure_cost_curves, draw_figure_efficiency
from finetune.report.figures.gradient_figures import draw_figure_02, draw_figure_03
from finetune.report.figures.scores_figure import draw_scores
from finetune.report.figures.steps_figure import draw_figure_steps
from finetune.runs.command import script
from finetune.store import records

log = logging.getLogger(__name__)

GRADIENTS = {"figure_02": draw_figure_02, "figure_03": draw_figure_03, "figure_energy": draw_figure_energy}


@script("figure")
def main(config: dict[str, Any]) -> None:
    results = Path("results") / config["name"]
    drawers = dict.fromkeys(GRADIENTS, _gradients) | {"figure_efficiency": _efficiency, "figure_cost_curves": _costs}
    drawers |= {"methods_scores": _scores, "figure_steps": _steps}
    experiment = load_experiment(config["experiment"], config["name"])
    wanted = experiment.figures if config["figure"] == "all" else [config["figure"]]
    if unknown := [name for name in wanted if name not in drawers]:
        raise ValueError(f"figure={unknown[0]!r}; allowed: all, {', '.join(drawers)}.")
    for name in wanted:
        for path in drawers[name](name, experiment, results):
            log.info("%s", path)


def _gradients(name: str, experiment: Experiment, results: Path) -> list[Path]:
    model = experiment.stands_for[PAPER_MODEL]
    if model is None:
        raise ValueError(f"stands_for.{PAPER_MODEL} of {experiment.name} names no model to draw gradients of.")
    looks = read_looks(results / "energy" / model, experiment.tasks)
    return GRADIENTS[name](looks, model, results / "figures")


def _efficiency(name: str, experiment: Experiment, results: Path) -> list[Path]:
    evidence = read_efficiency_evidence(experiment, results)
    return draw_figure_efficiency(evidence, results / "figures", experiment.labels)


def _steps(name: str, experiment: Experiment, results: Path) -> list[Path]:
    return draw_figure_steps(read_steps(results), results / "figures", experiment.labels)


def _costs(name: str, experiment: Experiment, results: Path) -> list[Path]:
    path = results / "cost_curves.json"
    return draw_figure_cost_curves(records.read_record(path), path.as_posix(), results / "figures", experiment.labels)


def _scores(name: str, experiment: Experiment, results: Path) -> list[Path]:
    path = results / "statistics.json"
    return draw_scores(records.read_json(path), results / "figures", [path.as_posix()], experiment.labels)


if __name__ == "__main__":
    main()
