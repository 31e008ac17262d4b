"""Fine-tune one model with one method, or a whole cell of tasks and seeds.

    python experiments/train.py model=minilm method=sparsegrad data.task=cola seed=1
    python experiments/train.py -m model=minilm method=full,lora,meprop,sparsegrad seed=1,2,3

As DVC runs it: ``cell=params.yaml name=smoke model=tiny_bert method=lora``; see conf/glue.yaml.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="glue")
def main(cfg: DictConfig) -> float | None:
    """Returns the score of a single run, for sweepers that optimise it."""
    from finetune.runs import cells

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        if cfg.cell is None:
            return cells.run_one(config)
        lists = cells.read_lists(cfg.cell)
        place = Path(cfg.model.name) / cfg.method.name
        folder, search = (Path("results") / cfg.name / kind / place for kind in ("runs", "search"))
        with cells.only_writer(folder, cfg.checkpoints):
            cells.train_cell(config, lists["tasks"], lists["seeds"], folder, search)
    return None


if __name__ == "__main__":
    main()
