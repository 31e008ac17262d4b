"""Build tables of the paper, as JSON, CSV, Markdown and LaTeX, from an experiment's records.

python experiments/table.py number=9 name=local
python experiments/table.py number=[3,7,8] name=local
python experiments/table.py number=all name=local questions=mt_bench_inf
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig, ListConfig

from finetune.mt_bench.journal import read_items
from finetune.mt_bench.scores import categories_of
from finetune.report.evidence.efficiency_evidence import read_efficiency_evidence
from finetune.report.evidence.evidence import read_evidence
from finetune.report.evidence.experiment import load_experiment
from finetune.report.tables.render import write_files
from finetune.report.tables.tables import build_table

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="table")
def main(cfg: DictConfig) -> None:
    results = Path("results") / cfg.name
    try:
        experiment = load_experiment(cfg.experiment, cfg.name)
        numbers = experiment.tables if cfg.number == "all" else cfg.number
        evidence, measured = read_evidence(experiment, results), read_efficiency_evidence(experiment, results)
        for number in numbers if isinstance(numbers, tuple | ListConfig) else [numbers]:
            table = build_table(number, evidence, measured, categories=_categories(cfg))
            for path in write_files(results / "tables", table):
                log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _categories(cfg: DictConfig) -> dict[int, str] | None:
    if cfg.get("questions") is None:
        return None
    return categories_of(read_items(Path(cfg.questions.root) / cfg.questions.folder / cfg.questions.questions))


if __name__ == "__main__":
    main()
