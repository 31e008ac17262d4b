"""Answer MT-Bench questions with fine-tuned decoders: one checkpoint, or all methods and seeds of a model.

    python experiments/answers.py model=stories260k method=sparsegrad seed=1
    python experiments/answers.py model=llama2_7b method=full scale=llama/paper checkpoint=path/to/merged/model

As DVC runs it: ``cell=params.yaml name=smoke model=tiny_llama``; see conf/mt_bench.yaml. A killed run goes on where it
was.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="mt_bench")
def main(cfg: DictConfig) -> None:
    from finetune.mt_bench.answer_cells import answer_cells, answer_one
    from finetune.runs import command

    with command.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        if cfg.cell is None:
            place = Path(cfg.model.name) / cfg.method.name
            checkpoint = Path(cfg.checkpoint or Path(cfg.output) / place / f"seed{cfg.seed}")
            folder = Path(cfg.output) / "mt_bench" / "answers" / place
            with command.only_writer(folder, cfg.checkpoints):
                answer_one(config, cfg.seed, checkpoint, folder)
            return
        lists = command.read_lists(cfg.cell, ["decoder_seeds", *([] if cfg.methods else ["methods"])])
        results = Path("results") / cfg.name
        trained, folder = results / "models", results / "mt_bench" / "answers"
        methods = config["methods"] or lists["methods"]
        answer_cells(config, methods, lists["decoder_seeds"], trained / cfg.model.name, folder / cfg.model.name)


if __name__ == "__main__":
    main()
