"""Energy of MLP gradients in five spaces while a model is fine-tuned: how sparse, how fast a basis goes stale.

python experiments/energy.py model=minilm data.task=cola basis=results/local/basis/minilm   # by hand, to outputs/
python experiments/energy.py cell=params.yaml name=local model=minilm basis=results/local/basis/minilm
"""

from pathlib import Path
from typing import Any

from finetune.runs.command import only_writer, read_lists, script


@script("energy")
def main(config: dict[str, Any]) -> None:
    from finetune.energy.cell import energy_cell

    if config["cell"] is None:
        tasks, root = [config["data"]["task"]], Path(config["output"])
    else:
        tasks, root = read_lists(config["cell"], ["tasks"])["tasks"], Path("results") / config["name"]
    folder = root / "energy" / config["model"]["name"]
    with only_writer(folder, config["checkpoints"]):
        energy_cell(config, tasks, folder)


if __name__ == "__main__":
    main()
