"""HOSVD bases from gradient moments, for every task of an experiment.

python experiments/basis.py cell=params.yaml name=smoke model=tiny_bert
python experiments/basis.py --config-name chat cell=params.yaml name=smoke model=tiny_llama
"""

from typing import Any

from finetune.runs.command import script


@script("glue")
def main(config: dict[str, Any]) -> None:
    from finetune.runs import cells, preliminary

    preliminary.basis_cell(cells.Cell.of(config))


if __name__ == "__main__":
    main()
