"""Time and peak memory of HOSVD by streaming moments, by the SVD of stacked unfoldings (the authors') and by TensorLy.

    python experiments/hosvd_cost.py scale=hosvd_cost/smoke                  # by hand, to outputs/
    python experiments/hosvd_cost.py results=true name=local scale=hosvd_cost/local

Gradients are made, with a known shared subspace: time and memory do not depend on the values, and a wrong answer shows.
"""

import logging

import hydra
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="hosvd_cost")
def main(cfg: DictConfig) -> None:
    from finetune.efficiency import hosvd_cost
    from finetune.efficiency.stage import Stage
    from finetune.runs import command

    with command.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        stage = Stage.from_config("hosvd_cost", config)
        with command.only_writer(stage.path, cfg.checkpoints):
            record = hosvd_cost.hosvd_cost(*hosvd_cost.read_config(config), stage)
        for line in hosvd_cost.summary(record):
            log.info("%s", line)
        log.info("%s", stage.path)


if __name__ == "__main__":
    main()
