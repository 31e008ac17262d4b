"""Publish the wandb workspace that stands in code, or write its definition.

python experiments/dashboard.py                                                        # to outputs/dashboard.json
WANDB_API_KEY=... python experiments/dashboard.py entity=me project=sparsegrad dry_run=false
"""

import logging
from typing import Any

from finetune.runs.command import script

log = logging.getLogger(__name__)


@script("dashboard")
def main(config: dict[str, Any]) -> None:
    from finetune.efficiency.variants import VARIANTS
    from finetune.store.files import write_atomically
    from finetune.tracking import dashboard

    entity, output = config["entity"], config["output"]
    if not config["dry_run"] and entity is None:
        raise ValueError("entity is missing: give the wandb user or team that owns the project, entity=NAME.")
    sections = dashboard.sections([variant.name for variant in VARIANTS])
    workspace = dashboard.build(entity or "entity", config["project"], sections)
    write_atomically(output, dashboard.serialise(workspace) + "\n")
    log.info("%s", output)
    if not config["dry_run"]:
        log.info("%s", dashboard.publish(workspace))


if __name__ == "__main__":
    main()
