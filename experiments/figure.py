"""Draw one figure from an experiment's records: SVG, PNG, and a JSON of its title, caption and notes.

python experiments/figure.py figure=figure_02 name=local
python experiments/figure.py figure=figure_energy name=local
"""

import logging
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig

from finetune.report.figures.energy_evidence import PAPER_MODEL, read_looks
from finetune.report.figures.energy_figure import draw_figure_energy
from finetune.report.figures.gradient_figures import draw_figure_02, draw_figure_03

log = logging.getLogger(__name__)

FIGURES = {"figure_02": draw_figure_02, "figure_03": draw_figure_03, "figure_energy": draw_figure_energy}


@hydra.main(version_base=None, config_path="../conf", config_name="figure")
def main(cfg: DictConfig) -> None:
    experiment = yaml.safe_load(Path(cfg.experiment).read_text())
    results = Path("results") / cfg.name
    try:
        if experiment["name"] != cfg.name:
            raise ValueError(f"{cfg.experiment} is experiment {experiment['name']!r}, not {cfg.name!r}.")
        if cfg.figure not in FIGURES:
            raise ValueError(f"figure={cfg.figure!r}; allowed: {', '.join(FIGURES)}.")
        model = experiment["stands_for"][PAPER_MODEL]
        if model is None:
            raise ValueError(f"{cfg.experiment}: stands_for.{PAPER_MODEL} names no model to draw gradients of.")
        looks = read_looks(results / "energy" / model, experiment["tasks"])
        for path in FIGURES[cfg.figure](looks, model, results / "figures"):
            log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
