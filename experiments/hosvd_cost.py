"""Time and peak memory of HOSVD by streaming moments, by the SVD of stacked unfoldings (the authors') and by TensorLy.

    python experiments/hosvd_cost.py scale=hosvd_cost/smoke                  # by hand, to outputs/
    python experiments/hosvd_cost.py results=true name=local scale=hosvd_cost/local

Gradients are made, with a known shared subspace: time and memory do not depend on the values, and a wrong answer shows.
"""

import logging
from typing import Any

from finetune.runs.command import only_writer, script

log = logging.getLogger(__name__)


@script("hosvd_cost")
def main(config: dict[str, Any]) -> None:
    from finetune.efficiency import hosvd_cost
    from finetune.efficiency.stage import Stage

    stage = Stage.from_config("hosvd_cost", config)
    with only_writer(stage.path.parent, config["checkpoints"], name=stage.path.name):
        record = hosvd_cost.hosvd_cost(*hosvd_cost.read_config(config), stage)
    for line in hosvd_cost.summary(record):
        log.info("%s", line)
    log.info("%s", stage.path)


if __name__ == "__main__":
    main()
