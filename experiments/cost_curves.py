"""Time of one MLP's training step as k, tokens and width grow: full, LoRA, three forms of SparseGrad, and the floor.

    python experiments/cost_curves.py scale=cost_curves/smoke                  # by hand, to outputs/
    python experiments/cost_curves.py results=true name=local scale=cost_curves/local

The floor is the frozen MLP: forward, and backward to the input.
"""

import logging

import hydra
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="cost_curves")
def main(cfg: DictConfig) -> None:
    from finetune.efficiency import cost_curves
    from finetune.efficiency.stage import Stage
    from finetune.runs import command

    with command.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        stage = Stage.from_config("cost_curves", config)
        with command.only_writer(stage.path, cfg.checkpoints):
            record = cost_curves.cost_curves(cost_curves.read_config(config), stage)
        for line in cost_curves.summary(record):
            log.info("%s", line)
        log.info("%s", stage.path)


if __name__ == "__main__":
    main()
