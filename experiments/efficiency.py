"""Steps per second and memory of every method on one model, with the token lengths of the experiment's tasks.

    python experiments/efficiency.py model=minilm data.task=cola                   # by hand, to outputs/
    python experiments/efficiency.py cell=params.yaml name=smoke model=tiny_bert scale=efficiency/smoke data=generated
    python experiments/efficiency.py model=roberta_base cell=params.yaml lengths_only=true   # lengths files alone

The lengths files are for ``python -m finetune.efficiency``, which measures on a machine without the data.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="efficiency")
def main(cfg: DictConfig) -> None:
    from finetune.efficiency import cell
    from finetune.runs import command

    with command.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        if cfg.cell is None:
            tasks, root = [cfg.data.task], Path(cfg.output)
        else:
            tasks, root = command.read_lists(cfg.cell, ["tasks"])["tasks"], Path("results") / cfg.name
        folder = root / "efficiency" / cfg.model.name
        if cfg.lengths_only:
            cell.write_lengths(config, tasks, Path(cfg.output) / "lengths" / cfg.model.name)
            return
        with command.only_writer(folder, cfg.checkpoints):
            cell.efficiency_cell(config, tasks, folder)


if __name__ == "__main__":
    main()
