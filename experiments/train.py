"""Fine-tune one model with one method, or a whole cell of tasks and seeds.

    python experiments/train.py model=minilm method=sparsegrad data.task=cola seed=1
    python experiments/train.py -m model=minilm method=full,lora,meprop,sparsegrad seed=1,2,3
    python experiments/train.py --config-name chat model=stories260k method=sparsegrad seed=1
    accelerate launch experiments/train.py --config-name chat model=llama2_7b scale=llama/paper seed=42

As DVC runs it: ``cell=params.yaml name=smoke model=tiny_bert method=lora``: what is not searched yet is searched first;
see conf/glue.yaml and conf/chat.yaml.
"""

from typing import Any

from finetune.runs.command import script


@script("glue")
def main(config: dict[str, Any]) -> float | None:
    """Returns the score of a single run, for sweepers that optimise it."""
    from finetune.runs import cells

    if config["cell"] is None:
        return cells.run_by_hand(config)
    cells.train_cell(cells.Cell.of(config))
    return None


if __name__ == "__main__":
    main()
