"""Steps per second and memory of every method on one model, with the token lengths of the experiment's tasks.

    python experiments/efficiency.py model=minilm data.task=cola                   # by hand, to outputs/
    python experiments/efficiency.py cell=params.yaml name=smoke model=tiny_bert scale=efficiency/smoke data=generated
    python experiments/efficiency.py model=roberta_base cell=params.yaml lengths_only=true   # lengths files alone

The lengths files are for ``python -m finetune.efficiency``, which measures on a machine without the data.
"""

from pathlib import Path
from typing import Any

from finetune.runs.command import only_writer, read_lists, script


@script("efficiency")
def main(config: dict[str, Any]) -> None:
    from finetune.efficiency import cell

    model, output = config["model"]["name"], Path(config["output"])
    if config["cell"] is None:
        tasks, root = [config["data"]["task"]], output
    else:
        tasks, root = read_lists(config["cell"], ["tasks"])["tasks"], Path("results") / config["name"]
    if config["lengths_only"]:
        cell.write_lengths(config, tasks, output / "lengths" / model)
        return
    folder = root / "efficiency" / model
    with only_writer(folder, config["checkpoints"]):
        cell.efficiency_cell(config, tasks, folder)


if __name__ == "__main__":
    main()
