"""Pretrain a tiny model of the smoke experiment: an encoder on its text, or a decoder on its dialogues.

python experiments/pretrain.py name=smoke model=tiny_bert
python experiments/pretrain.py name=smoke model=tiny_llama
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="pretrain")
def main(cfg: DictConfig) -> None:
    import torch

    from finetune.data.chat import chat_template
    from finetune.models.pretraining import Pretraining, pretrain, pretrain_causal
    from finetune.runs.command import exit_with_message

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    decoder = "template" in cfg.model
    settings = dict(cfg.decoder if decoder else cfg.encoder)
    length = settings.pop("length", None)
    options = Pretraining(**settings, seed=cfg.seed, device=torch.device(cfg.device), progress_bar=cfg.progress)
    architecture, results = OmegaConf.to_container(cfg.model.architecture, resolve=True), Path("results") / cfg.name
    with exit_with_message():
        if decoder:
            folder, template = results / "chat", chat_template(cfg.model.template)
            text, checkpoint = folder / "text" / "dialogues.txt", folder / cfg.model.folder
            facts = pretrain_causal(text, checkpoint, architecture, template, length, options)
        else:
            folder = results / "data"
            facts = pretrain(folder / "text" / "corpus.txt", folder / cfg.model.folder, architecture, options)
    log.info("%s: %s", cfg.model.name, facts)


if __name__ == "__main__":
    main()
