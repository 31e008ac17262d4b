"""Methods against each other, ours and the authors' logs; printed averages and cells against what they rest on.

python experiments/method_statistics.py name=local

Not `statistics.py`: the scripts' folder comes first on the path, and the standard library has that name.
"""

import logging
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig

from finetune.report.evidence.evidence import collect_evidence
from finetune.report.evidence.llama_evidence import collect_llama_evidence
from finetune.report.labels import read_labels
from finetune.report.statistics.families import Design
from finetune.report.statistics.statistics_page import to_markdown
from finetune.report.statistics.statistics_record import build_statistics
from finetune.store import records
from finetune.store.files import write_atomically

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="statistics")
def main(cfg: DictConfig) -> None:
    experiment = yaml.safe_load(Path(cfg.experiment).read_text())
    results = Path("results") / cfg.name
    try:
        if experiment["name"] != cfg.name:
            raise ValueError(f"{cfg.experiment} is experiment {experiment['name']!r}, not {cfg.name!r}.")
        what = {name: experiment[name] for name in ("protocol", "stands_for")} | {"experiment": cfg.name}
        runs = [(path.as_posix(), record) for path, record in records.iterate(results / "runs")]
        evidence = collect_evidence(**what, records=runs)
        decoder = collect_llama_evidence(**what, records=runs)
        labels = read_labels(experiment["data"])
        design = Design(labels, tuple(experiment["methods"]), cfg.focus, cfg.baseline, cfg.seed, cfg.samples)
        content = build_statistics(evidence, decoder, design)
        json, page = results / "statistics.json", results / "statistics.md"
        records.write_json(json, content)
        write_atomically(page, to_markdown(content))
        for path in (json, page):
            log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
