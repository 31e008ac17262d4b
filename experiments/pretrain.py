"""Pretrain a tiny model of the smoke experiment.

python experiments/pretrain.py name=smoke model=tiny_bert
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="pretrain")
def main(cfg: DictConfig) -> None:
    import torch

    from finetune.models.pretraining import Pretraining, pretrain
    from finetune.runs.command import exit_with_message

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    folder = Path("results") / cfg.name / "data"
    options = Pretraining(
        vocab_size=cfg.vocab_size,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        learning_rate=cfg.learning_rate,
        seed=cfg.seed,
        device=torch.device(cfg.device),
        progress_bar=cfg.progress,
    )
    with exit_with_message():
        facts = pretrain(
            folder / "text" / "corpus.txt",
            folder / cfg.model.folder,
            OmegaConf.to_container(cfg.model.architecture, resolve=True),
            options,
        )
    log.info("%s: %s", cfg.model.name, facts)


if __name__ == "__main__":
    main()
