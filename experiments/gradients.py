"""Preliminary phase: gradient moments of the MLP matrices, for every task of an experiment.

python experiments/gradients.py cell=params.yaml name=smoke model=tiny_bert scale=smoke data=generated
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="glue")
def main(cfg: DictConfig) -> None:
    from finetune.runs import cells

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        lists = cells.read_lists(cfg.cell or "params.yaml")
        cells.gradients_cell(config, lists["tasks"], Path("results") / cfg.name / "gradients" / cfg.model.name)


if __name__ == "__main__":
    main()
