"""Send an experiment's records to wandb after the fact, so that what an offline cluster made is not lost.

    python experiments/replay.py name=local                               # offline runs below outputs/replay
    WANDB_API_KEY=... python experiments/replay.py name=local wandb.mode=online
    wandb sync outputs/replay/wandb/offline-run-*                         # or: send offline runs later

Runs have the ids that they had when they were tracked; what was sent is not sent twice.
"""

import logging

import hydra
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="replay")
def main(cfg: DictConfig) -> None:
    from finetune.runs import cells
    from finetune.tracking import mirror, replay

    with cells.exit_with_message():
        found = list(mirror.collect(cfg.results, cfg.name))
        counts = replay.publish(found, OmegaConf.to_container(cfg.wandb), progress_bar=cfg.progress)
        log.info("%s: %s runs sent, %s sent before, %s skipped", cfg.name, *counts.values())


if __name__ == "__main__":
    main()
