"""Build one table of the paper, as CSV, Markdown and LaTeX, from an experiment's records.

python experiments/table.py number=9 name=local
"""

import logging
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig

from finetune import records
from finetune.report.tables import build_table, collect_evidence, write_table

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="table")
def main(cfg: DictConfig) -> None:
    experiment = yaml.safe_load(Path(cfg.experiment).read_text())
    results = Path("results") / cfg.name
    try:
        if experiment["name"] != cfg.name:
            raise ValueError(f"{cfg.experiment} is experiment {experiment['name']!r}, not {cfg.name!r}.")
        evidence = collect_evidence(
            experiment=cfg.name,
            protocol=experiment["protocol"],
            stands_for=experiment["stands_for"],
            records=[(path.as_posix(), record) for path, record in records.iterate(results / "runs")],
            searches=[(p.as_posix(), records.read_json(p)) for p in sorted(results.glob("search/*/*/*.json"))],
            models=[(p.as_posix(), yaml.safe_load(p.read_text())) for p in sorted(Path("conf/model").glob("*.yaml"))],
        )
        rows, context = build_table(cfg.number, evidence)
        for path in write_table(results / "tables", cfg.number, rows, context):
            log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
