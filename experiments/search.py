"""Search learning rate and batch size for every task of a cell, as train.py does before its runs.

    python experiments/search.py cell=params.yaml name=smoke model=tiny_bert method=lora scale=smoke data=generated

A killed search goes on where it was; see conf/glue.yaml, conf/scale and conf/protocol for what it searches.
"""

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="glue")
def main(cfg: DictConfig) -> None:
    from finetune.runs import cells, command

    with command.exit_with_message():
        cell = cells.Cell.of(OmegaConf.to_container(cfg, resolve=True))
        with command.only_writer(cell.folder("runs"), cfg.checkpoints):
            cells.search_cell(cell)


if __name__ == "__main__":
    main()
