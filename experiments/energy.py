"""Energy of MLP gradients in five spaces while a model is fine-tuned: how sparse, how fast a basis goes stale.

python experiments/energy.py model=minilm data.task=cola basis=results/local/basis/minilm   # by hand, to outputs/
python experiments/energy.py cell=params.yaml name=local model=minilm basis=results/local/basis/minilm
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="energy")
def main(cfg: DictConfig) -> None:
    from finetune.energy.cell import energy_cell
    from finetune.runs import command

    with command.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        if cfg.cell is None:
            tasks, root = [cfg.data.task], Path(cfg.output)
        else:
            tasks, root = command.read_lists(cfg.cell, ["tasks"])["tasks"], Path("results") / cfg.name
        folder = root / "energy" / cfg.model.name
        with command.only_writer(folder, cfg.checkpoints):
            energy_cell(config, tasks, folder)


if __name__ == "__main__":
    main()
