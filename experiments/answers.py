"""Answer MT-Bench questions with fine-tuned decoders: one checkpoint, or all methods and seeds of a model.

    python experiments/answers.py model=stories260k method=sparsegrad seed=1
    python experiments/answers.py model=llama2_7b method=full scale=llama/paper checkpoint=path/to/merged/model

As DVC runs it: ``cell=params.yaml name=smoke model=tiny_llama``; see conf/mt_bench.yaml. A killed run goes on where it
was.
"""

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="mt_bench")
def main(cfg: DictConfig) -> None:
    from finetune.mt_bench.answer_cells import answer_cells
    from finetune.mt_bench.cells import work_of
    from finetune.runs import command

    with command.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        root, methods, seeds = work_of(config)
        models = root if cfg.cell is None else root / "models"
        folder = root / "mt_bench" / "answers" / cfg.model.name
        answer_cells(config, methods, seeds, models / cfg.model.name, folder)


if __name__ == "__main__":
    main()
