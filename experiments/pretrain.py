"""Pretrain a tiny model of the smoke experiment: an encoder on its text, or a decoder on its dialogues.

python experiments/pretrain.py name=smoke model=tiny_bert
python experiments/pretrain.py name=smoke model=tiny_llama
"""

import logging
from pathlib import Path
from typing import Any

from finetune.runs.command import script

log = logging.getLogger(__name__)


@script("pretrain")
def main(config: dict[str, Any]) -> None:
    import torch

    from finetune.data.chat import chat_template
    from finetune.models.pretraining import Pretraining, pretrain, pretrain_causal

    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    model, results = config["model"], Path("results") / config["name"]
    decoder = "template" in model
    settings = dict(config["decoder" if decoder else "encoder"])
    length = settings.pop("length", None)
    device = torch.device(config["device"])
    options = Pretraining(**settings, seed=config["seed"], device=device, progress_bar=config["progress"])
    if decoder:
        folder, template = results / "chat", chat_template(model["template"])
        text, checkpoint = folder / "text" / "dialogues.txt", folder / model["folder"]
        facts = pretrain_causal(text, checkpoint, model["architecture"], template, length, options)
    else:
        folder = results / "data"
        facts = pretrain(folder / "text" / "corpus.txt", folder / model["folder"], model["architecture"], options)
    log.info("%s: %s", model["name"], facts)


if __name__ == "__main__":
    main()
