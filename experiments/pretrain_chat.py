"""Pretrain the tiny decoder of the smoke experiment on its dialogues.

python experiments/pretrain_chat.py name=smoke model=tiny_llama
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="pretrain_chat")
def main(cfg: DictConfig) -> None:
    import torch

    from finetune.data.chat import chat_template
    from finetune.models.pretraining import Pretraining, pretrain_causal
    from finetune.runs.command import exit_with_message

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    folder = Path("results") / cfg.name / "chat"
    options = Pretraining(
        vocab_size=cfg.vocab_size,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        learning_rate=cfg.learning_rate,
        seed=cfg.seed,
        device=torch.device(cfg.device),
        progress_bar=cfg.progress,
        warmup=0.05,
        beta2=0.98,
    )
    with exit_with_message():
        facts = pretrain_causal(
            folder / "text" / "dialogues.txt",
            folder / cfg.model.folder,
            OmegaConf.to_container(cfg.model.architecture, resolve=True),
            chat_template(cfg.model.get("template")),
            cfg.length,
            options,
        )
    log.info("%s: %s", cfg.model.name, facts)


if __name__ == "__main__":
    main()
