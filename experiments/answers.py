"""Answer MT-Bench questions with fine-tuned decoders: one checkpoint, or all methods and seeds of a model.

    python experiments/answers.py model=stories260k method=sparsegrad seed=1
    python experiments/answers.py model=llama2_7b method=full scale=llama/paper checkpoint=path/to/merged/model

As DVC runs it: ``cell=params.yaml name=smoke model=tiny_llama``; see conf/mt_bench.yaml. A killed run goes on where it
was.
"""

from typing import Any

from finetune.runs.command import script


@script("mt_bench")
def main(config: dict[str, Any]) -> None:
    from finetune.mt_bench.answer_cells import answer_cells
    from finetune.mt_bench.cells import work_of

    root, methods, seeds = work_of(config)
    name, models = config["model"]["name"], root if config["cell"] is None else root / "models"
    answer_cells(config, methods, seeds, models / name, root / "mt_bench" / "answers" / name)


if __name__ == "__main__":
    main()
