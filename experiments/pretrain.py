"""Pretrain a tiny model of the smoke experiment: an encoder on its text, or a decoder on its dialogues.

python experiments/pretrain.py name=smoke model=tiny_bert
python experiments/pretrain.py name=smoke model=tiny_llama
"""

import logging
from pathlib import Path
from typing import Any

from finetune.runs.command import only_writer, script
from finetune.store.places import LOCKS

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
    folder = results / ("chat" if decoder else "data")
    text, checkpoint = folder / "text", folder / model["folder"]
    with only_writer(checkpoint.parent, LOCKS, name=checkpoint.name):
        if decoder:
            template = chat_template(model["template"])
            facts = pretrain_causal(
                text / "dialogues.txt", checkpoint, model["architecture"], template, length, options
            )
        else:
            facts = pretrain(text / "corpus.txt", checkpoint, model["architecture"], options)
    log.info("%s: %s", model["name"], facts)


if __name__ == "__main__":
    main()
