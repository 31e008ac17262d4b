"""Publish the wandb workspace that stands in code, or write its definition.

python experiments/dashboard.py                                                        # to outputs/dashboard.json
WANDB_API_KEY=... python experiments/dashboard.py entity=me project=sparsegrad dry_run=false
"""

import logging

import hydra
from omegaconf import DictConfig

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="dashboard")
def main(cfg: DictConfig) -> None:
    from finetune.efficiency.variants import VARIANTS
    from finetune.runs import command
    from finetune.store.files import write_atomically
    from finetune.tracking import dashboard

    with command.exit_with_message():
        if not cfg.dry_run and cfg.entity is None:
            raise ValueError("entity is missing: give the wandb user or team that owns the project, entity=NAME.")
        workspace = dashboard.build(
            cfg.entity or "entity", cfg.project, dashboard.sections([variant.name for variant in VARIANTS])
        )
        write_atomically(cfg.output, dashboard.serialise(workspace) + "\n")
        log.info("%s", cfg.output)
        if not cfg.dry_run:
            log.info("%s", dashboard.publish(workspace))


if __name__ == "__main__":
    main()
