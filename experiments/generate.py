"""Generate the text and tasks of the smoke experiment.

python experiments/generate.py name=smoke
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from finetune.data.generated import write_corpus, write_task


@hydra.main(version_base=None, config_path="../conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    folder = Path("results") / cfg.name / "data"
    write_corpus(folder / "text" / "corpus.txt", cfg.corpus_sentences, cfg.seed)
    try:
        for task in cfg.tasks:
            write_task(task, folder / "glue", cfg.train, cfg.validation, cfg.seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
