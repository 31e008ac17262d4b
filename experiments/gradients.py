"""Preliminary phase: gradient moments of the MLP matrices, for every task of an experiment.

python experiments/gradients.py cell=params.yaml name=smoke model=tiny_bert scale=smoke data=generated
python experiments/gradients.py --config-name chat cell=params.yaml name=smoke model=tiny_llama scale=llama/smoke
"""

from typing import Any

from finetune.runs.command import script


@script("glue")
def main(config: dict[str, Any]) -> None:
    from finetune.runs import cells, preliminary

    preliminary.gradients_cell(cells.Cell.of(config))


if __name__ == "__main__":
    main()
