"""HOSVD bases from gradient moments, for every task of an experiment.

python experiments/basis.py cell=params.yaml name=smoke model=tiny_bert
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path="../conf", config_name="glue")
def main(cfg: DictConfig) -> None:
    from finetune.runs import cells

    with cells.exit_with_message():
        tasks = cells.read_lists(cfg.cell or "params.yaml")["tasks"]
        results = Path("results") / cfg.name
        source, folder = results / "gradients" / cfg.model.name, results / "basis" / cfg.model.name
        cells.basis_cell(tasks, source, folder, device=cfg.device, threads=cfg.threads)


if __name__ == "__main__":
    main()
