"""Search learning rate and batch size for every task of a cell.

    python experiments/search.py cell=params.yaml name=smoke model=tiny_bert method=lora scale=smoke data=generated

A killed search goes on where it was; see conf/glue.yaml, conf/scale and conf/protocol for what it searches.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="glue")
def main(cfg: DictConfig) -> None:
    from finetune.runs import cells
    from finetune.store import records
    from finetune.tracking import mirror, replay

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        lists = cells.read_lists(cfg.cell or "params.yaml")
        folder = Path("results") / cfg.name / "search" / cfg.model.name / cfg.method.name
        with cells.only_writer(folder, cfg.checkpoints):
            cells.search_cell(config, lists["tasks"], folder)
            paths = [folder / f"{task}.json" for task in lists["tasks"]]
            found = [mirror.of_search(records.read_json(path), path) for path in paths]
            replay.publish([*mirror.bases_of(config), *found], config["wandb"])


if __name__ == "__main__":
    main()
