"""Write the report of an experiment: one page that works offline, from everything that its stages left.

python experiments/report.py name=local
"""

import logging
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig

from finetune.report.labels import read_labels
from finetune.report.page.context import to_html
from finetune.report.page.inputs import read_inputs
from finetune.store.files import write_atomically

log = logging.getLogger(__name__)

PROTOCOLS = {"GLUE": Path("conf/protocol"), "LLaMa-2": Path("conf/protocol/llama")}


@hydra.main(version_base=None, config_path="../conf", config_name="report")
def main(cfg: DictConfig) -> None:
    experiment = yaml.safe_load(Path(cfg.experiment).read_text())
    results = Path("results") / cfg.name
    try:
        if experiment["name"] != cfg.name:
            raise ValueError(f"{cfg.experiment} is experiment {experiment['name']!r}, not {cfg.name!r}.")
        inputs = read_inputs(
            results,
            experiment=experiment,
            labels=read_labels(experiment.get("data")),
            protocols={
                title: {path.stem: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))}
                for title, folder in PROTOCOLS.items()
            },
            expected=dict(cfg.figures),
        )
        path = Path(cfg.output or results / "report.html")
        write_atomically(path, to_html(inputs))
        log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
