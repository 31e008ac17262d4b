"""HOSVD bases of a decoder from its gradient moments.

python experiments/llama_basis.py name=smoke model=tiny_llama
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="llama")
def main(cfg: DictConfig) -> None:
    from finetune.runs import cells, chat_cells

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        place, file = Path("results") / cfg.name / "llama", f"{cfg.model.name}.safetensors"
        chat_cells.basis_cell(
            place / "gradients" / file, place / "basis" / file, device=cfg.device, threads=config["threads"]
        )


if __name__ == "__main__":
    main()
