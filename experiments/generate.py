"""Generate the text, tasks, dialogues, questions and judge prompts of the smoke experiment.

python experiments/generate.py name=smoke
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from finetune.data.generated import write_corpus, write_task
from finetune.data.generated_chat import write_chat


@hydra.main(version_base=None, config_path="../conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    folder, glue = Path("results") / cfg.name, cfg.glue
    try:
        write_corpus(folder / "data" / "text" / "corpus.txt", glue.corpus_sentences, cfg.seed)
        for task in glue.tasks:
            write_task(task, folder / "data" / "glue", glue.train, glue.validation, cfg.seed)
        write_chat(folder / "chat", trees=cfg.chat.trees, dialogues=cfg.chat.dialogues, seed=cfg.seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
