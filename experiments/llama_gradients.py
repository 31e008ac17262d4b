"""Preliminary phase of a decoder: gradient moments of its MLP matrices on dialogues.

python experiments/llama_gradients.py name=smoke model=tiny_llama chat=generated_chat scale=llama/smoke
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="llama")
def main(cfg: DictConfig) -> None:
    from finetune.runs import cells, chat_cells

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        chat_cells.gradients_cell(
            config, Path("results") / cfg.name / "llama" / "gradients" / f"{cfg.model.name}.safetensors"
        )


if __name__ == "__main__":
    main()
