"""Methods against each other, ours and the authors' logs; printed averages and cells against what they rest on.

python experiments/method_statistics.py name=local

Not `statistics.py`: the scripts' folder comes first on the path, and the standard library has that name.
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig

from finetune.report.evidence.evidence import read_evidence
from finetune.report.evidence.experiment import load_experiment
from finetune.report.statistics.families import Design
from finetune.report.statistics.statistics_page import to_markdown
from finetune.report.statistics.statistics_record import build_statistics
from finetune.store import records
from finetune.store.files import write_atomically

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="statistics")
def main(cfg: DictConfig) -> None:
    results = Path("results") / cfg.name
    try:
        experiment = load_experiment(cfg.experiment, cfg.name)
        design = Design(experiment.labels, experiment.methods, cfg.focus, cfg.baseline, cfg.seed, cfg.samples)
        content = build_statistics(read_evidence(experiment, results), design)
        json, page = results / "statistics.json", results / "statistics.md"
        records.write_json(json, content)
        write_atomically(page, to_markdown(content))
        for path in (json, page):
            log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
