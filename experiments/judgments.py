"""Judge answers to MT-Bench with a judge model: one answer file, or all seeds of a cell.

    python experiments/judgments.py model=stories260k method=sparsegrad seed=1 judge=local
    OPENAI_API_KEY=... python experiments/judgments.py model=llama2_7b method=full scale=llama/paper judge=openai

As DVC runs it: ``cell=params.yaml name=smoke model=tiny_llama method=lora judge=local``; see conf/mt_bench.yaml.
What is judged is not judged again; failures are counted, listed in ``<model>-<method>-seed<seed>.failures.jsonl``, and
done again by the next run.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="../conf", config_name="mt_bench")
def main(cfg: DictConfig) -> None:
    from finetune.mt_bench.cells import judge_cell
    from finetune.runs import cells

    with cells.exit_with_message():
        config = OmegaConf.to_container(cfg, resolve=True)
        if cfg.cell is None:
            root, seeds = Path(cfg.output), [cfg.seed]
        else:
            root, seeds = Path("results") / cfg.name, cells.read_lists(cfg.cell, ["llama_seeds"])["llama_seeds"]
        place = Path(cfg.model.name) / cfg.method.name
        answers, folder = (root / "mt_bench" / kind / place for kind in ("answers", "judgments"))
        with cells.only_writer(folder, cfg.checkpoints):
            judge_cell(config, seeds, answers, folder)


if __name__ == "__main__":
    main()
