"""Draw speed and memory of all variants, or the cost curves, from an experiment's records: SVG, PNG and JSON.

python experiments/figure_efficiency.py figure=figure_efficiency name=local
python experiments/figure_efficiency.py figure=figure_cost_curves name=local
"""

import logging
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig

from finetune.report.evidence.efficiency_evidence import collect_efficiency_evidence
from finetune.report.figures.figures_efficiency import draw_figure_cost_curves, draw_figure_efficiency
from finetune.store import records

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="figure")
def main(cfg: DictConfig) -> None:
    experiment = yaml.safe_load(Path(cfg.experiment).read_text())
    results = Path("results") / cfg.name
    figures = {"figure_efficiency": _efficiency, "figure_cost_curves": _cost_curves}
    try:
        if experiment["name"] != cfg.name:
            raise ValueError(f"{cfg.experiment} is experiment {experiment['name']!r}, not {cfg.name!r}.")
        if cfg.figure not in figures:
            raise ValueError(f"figure={cfg.figure!r}; allowed: {', '.join(figures)}.")
        for path in figures[cfg.figure](experiment, results):
            log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _efficiency(experiment: dict, results: Path) -> list[Path]:
    models = experiment["efficiency_models"]
    files = sorted((results / "efficiency" / models[0]).glob("*.json")) if models else []
    evidence = collect_efficiency_evidence(
        experiment=experiment["name"],
        protocol=experiment["protocol"],
        models=models,
        records=[(path.as_posix(), records.read_json(path)) for path in files],
    )
    return draw_figure_efficiency(evidence, results / "figures")


def _cost_curves(experiment: dict, results: Path) -> list[Path]:
    path = results / "cost_curves.json"
    return draw_figure_cost_curves(records.read_json(path), path.as_posix(), results / "figures")


if __name__ == "__main__":
    main()
