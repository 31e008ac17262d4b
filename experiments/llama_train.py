"""Fine-tune a decoder on dialogues with one method, one seed or a cell of them.

    python experiments/llama_train.py model=stories260k method=sparsegrad seed=1
    accelerate launch experiments/llama_train.py model=llama2_7b method=sparsegrad scale=llama/paper seed=42

As DVC runs it: ``cell=params.yaml name=smoke model=tiny_llama method=lora``; see conf/llama.yaml.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="llama")
def main(cfg: DictConfig) -> float | None:
    """Returns the validation loss of a single run, for sweepers that optimise it."""
    from finetune.runs import cells, chat_cells

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        if cfg.cell is None:
            return chat_cells.run_one(config)
        seeds = cells.read_lists(cfg.cell, ["llama_seeds"])["llama_seeds"]
        place = Path("results") / cfg.name / "llama"
        folder, merged = (place / kind / cfg.model.name / cfg.method.name for kind in ("runs", "models"))
        with cells.only_writer(folder, cfg.checkpoints):
            chat_cells.train_cell(config, seeds, folder, merged)
    return None


if __name__ == "__main__":
    main()
