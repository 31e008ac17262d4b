"""Time of one MLP's training step as k, tokens and width grow: full, LoRA, three forms of SparseGrad, and the floor.

    python experiments/cost_curves.py scale=cost_curves/smoke                  # by hand, to outputs/
    python experiments/cost_curves.py results=true name=local scale=cost_curves/local

The floor is the frozen MLP: forward, and backward to the input.
"""

import logging
from typing import Any

from finetune.runs.command import only_writer, script

log = logging.getLogger(__name__)


@script("cost_curves")
def main(config: dict[str, Any]) -> None:
    from finetune.efficiency import cost_curves
    from finetune.efficiency.stage import Stage

    stage = Stage.from_config("cost_curves", config)
    with only_writer(stage.path.parent, config["checkpoints"], name=stage.path.name):
        record = cost_curves.cost_curves(cost_curves.read_config(config), stage)
    for line in cost_curves.summary(record):
        log.info("%s", line)
    log.info("%s", stage.path)


if __name__ == "__main__":
    main()
