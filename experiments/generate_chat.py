"""Generate the dialogues, questions and judge prompts of the smoke experiment.

python experiments/generate_chat.py name=smoke
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from finetune.data.generated_chat import write_chat


@hydra.main(version_base=None, config_path="../conf", config_name="generate_chat")
def main(cfg: DictConfig) -> None:
    try:
        write_chat(Path("results") / cfg.name / "chat", trees=cfg.trees, dialogues=cfg.dialogues, seed=cfg.seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
