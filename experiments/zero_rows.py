"""Is the sparse-by-dense product just padding? Counts zero rows of output gradients, padded to 128 and dynamically.

    python experiments/zero_rows.py model=minilm data.task=cola
    python experiments/zero_rows.py cell=params.yaml name=local model=minilm     # every task, to results/

Of the pretrained model, before any training step.
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="zero_rows")
def main(cfg: DictConfig) -> None:
    from finetune.energy.zero_rows import zero_rows_of_tasks
    from finetune.runs import cells

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        tasks = [cfg.data.task] if cfg.cell is None else cells.read_lists(cfg.cell, ["tasks"])["tasks"]
        root = Path(cfg.output) if cfg.cell is None else Path("results") / cfg.name
        path = root / "zero_rows" / f"{cfg.model.name}.json"
        for line in zero_rows_of_tasks(config, tasks, path):
            log.info("%s", line)
        log.info("%s", path)


if __name__ == "__main__":
    main()
