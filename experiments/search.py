"""Search learning rate and batch size for every task of a cell, as train.py does before its runs.

    python experiments/search.py cell=params.yaml name=smoke model=tiny_bert method=lora scale=smoke data=generated

A killed search goes on where it was; see conf/glue.yaml, conf/scale and conf/protocol for what it searches.
"""

from typing import Any

from finetune.runs.command import script


@script("glue")
def main(config: dict[str, Any]) -> None:
    from finetune.runs import cells

    cells.search_cell(cells.Cell.of(config))


if __name__ == "__main__":
    main()
