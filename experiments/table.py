"""Build one table of the paper, as CSV, Markdown and LaTeX, from an experiment's records.

python experiments/table.py number=9 name=local
python experiments/table.py number=6 name=local questions=mt_bench_inf
python experiments/table.py number=7 name=local
"""

import logging
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf

from finetune.mt_bench.journal import read_items
from finetune.mt_bench.judged import read_judgments
from finetune.mt_bench.scores import categories_of
from finetune.report.evidence.efficiency_evidence import collect_efficiency_evidence
from finetune.report.evidence.llama_evidence import PAPER_MODEL, collect_llama_evidence
from finetune.report.tables import efficiency_tables, table_06
from finetune.report.tables.tables import build_table, collect_evidence, write_table
from finetune.store import records

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="table")
def main(cfg: DictConfig) -> None:
    experiment = yaml.safe_load(Path(cfg.experiment).read_text())
    results = Path("results") / cfg.name
    try:
        if experiment["name"] != cfg.name:
            raise ValueError(f"{cfg.experiment} is experiment {experiment['name']!r}, not {cfg.name!r}.")
        own = {table_06.NUMBER: _table_06} | dict.fromkeys(efficiency_tables.TITLES, _efficiency_table)
        for number in experiment["tables"] if cfg.number == "all" else [cfg.number]:
            rows, context = own.get(number, _glue_table)(OmegaConf.merge(cfg, {"number": number}), experiment, results)
            for path in write_table(results / "tables", number, rows, context):
                log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _glue_table(cfg: DictConfig, experiment: dict, results: Path):
    return build_table(cfg.number, _glue_evidence(cfg, experiment, results))


def _glue_evidence(cfg: DictConfig, experiment: dict, results: Path):
    return collect_evidence(
        experiment=cfg.name,
        protocol=experiment["protocol"],
        stands_for=experiment["stands_for"],
        records=[(path.as_posix(), record) for path, record in records.iterate(results / "runs")],
        searches=[(p.as_posix(), records.read_json(p)) for p in sorted(results.glob("search/*/*/*.json"))],
        models=[(p.as_posix(), yaml.safe_load(p.read_text())) for p in sorted(Path("conf/model").glob("*.yaml"))],
    )


def _table_06(cfg: DictConfig, experiment: dict, results: Path):
    evidence = collect_llama_evidence(
        experiment=cfg.name,
        protocol=experiment["protocol"],
        stands_for=experiment["stands_for"],
        records=[(path.as_posix(), record) for path, record in records.iterate(results / "runs")],
        judgments=read_judgments(results / "mt_bench" / "judgments"),
    )
    path, categories = Path("conf/model") / f"{PAPER_MODEL}.yaml", None
    if cfg.get("questions") is not None:
        questions = Path(cfg.questions.root) / cfg.questions.folder / cfg.questions.questions
        categories = categories_of(read_items(questions))
    full_model = (path.as_posix(), yaml.safe_load(path.read_text())) if path.is_file() else None
    return table_06.build_table_06(evidence, full_model=full_model, categories=categories)


def _efficiency_table(cfg: DictConfig, experiment: dict, results: Path):
    models = experiment.get("efficiency_models") or []
    files = sorted((results / "efficiency" / models[0]).glob("*.json")) if models else []
    evidence = collect_efficiency_evidence(
        experiment=cfg.name,
        protocol=experiment["protocol"],
        models=models,
        records=[(path.as_posix(), records.read_json(path)) for path in files],
        runs=_glue_evidence(cfg, experiment, results).runs,
    )
    return efficiency_tables.build_efficiency_table(cfg.number, evidence)


if __name__ == "__main__":
    main()
