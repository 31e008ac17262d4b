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
    from finetune.tracking.results import send_search

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        lists = cells.read_lists(cfg.cell or "params.yaml")
        folder = Path("results") / cfg.name / "search" / cfg.model.name / cfg.method.name
        with cells.only_writer(folder, cfg.checkpoints):
            paths = [folder / f"{task}.json" for task in lists["tasks"]]
            before = {path: records.read_json(path)["trials"] for path in paths if path.is_file()}
            cells.search_cell(config, lists["tasks"], folder)
            for path in paths:
                content = records.read_json(path)
                if content["trials"] != before.get(path):
                    send_search(content, config["wandb"])


if __name__ == "__main__":
    main()
