"""Search learning rate and batch size for every task of a cell, as train.py does before its runs.

    python experiments/search.py cell=params.yaml name=smoke model=tiny_bert method=lora scale=smoke data=generated

A killed search goes on where it was; see conf/glue.yaml, conf/scale and conf/protocol for what it searches.
"""

from typing import Any

from finetune.runs.command import only_writer, script


@script("glue")
def main(config: dict[str, Any]) -> None:
    from finetune.runs import cells

    cell = cells.Cell.of(config)
    with only_writer(cell.folder("runs"), config["checkpoints"]):
        cells.search_cell(cell)


if __name__ == "__main__":
    main()
