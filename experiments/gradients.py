"""Preliminary phase: gradient moments of the MLP matrices, for every task of an experiment.

python experiments/gradients.py cell=params.yaml name=smoke model=tiny_bert scale=smoke data=generated
python experiments/gradients.py --config-name chat cell=params.yaml name=smoke model=tiny_llama scale=llama/smoke
"""

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="glue")
def main(cfg: DictConfig) -> None:
    from finetune.runs import cells, command

    with command.exit_with_message():
        cells.gradients_cell(cells.Cell.of(OmegaConf.to_container(cfg, resolve=True)))


if __name__ == "__main__":
    main()
