"""What an experiment needs before anything runs: time by kind of card, memory, disk, judge calls; and what it took.

    python experiments/plan.py experiment=experiments/paper.yaml          # or: make plan EXPERIMENT=paper
    python experiments/plan.py experiment=experiments/local.yaml cards.A40.price=0.5 currency=EUR
    python experiments/plan.py experiment=experiments/paper.yaml what_if.protocol=sound

Needs no GPU and no network. All numbers go to outputs/plan/<name>.json too.
"""

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from finetune.config.check import GROUPS, check_group
from finetune.plan.estimate import plan_experiment
from finetune.plan.experiment import Experiment
from finetune.plan.text import plan_text
from finetune.plan.throughput import Processor
from finetune.runs.command import script
from finetune.store.experiment import load
from finetune.store.files import read_yaml, write_atomically

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[1] / "conf"
PLANNED = ("gradients", "basis", "train", "efficiency", "answers", "judgments")


def read(group: str, name: str, sizes: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """A configuration group's file; an encoder's scale with other sizes."""
    folder, _, stem = f"{group}/{name}".strip("/").rpartition("/")
    path = CONF / folder / f"{stem}.yaml"
    content = read_yaml(path)
    if sizes and folder == "scale":
        content |= sizes | {"search": content["search"] | sizes.get("search", {})}
    if folder in GROUPS and folder != "judge":  # a judge's file refers to its scale
        check_group(folder, content, file=path.relative_to(CONF.parent))
    return content


def unplanned(folder: Path) -> list[str]:
    """Stages of dvc.yaml that the plan leaves out."""
    path = folder / "dvc.yaml"
    return [stage for stage in yaml.safe_load(path.read_text())["stages"] if stage not in PLANNED]


def plan(settings: dict[str, Any]) -> dict[str, Any]:
    """The plan, logged and returned."""
    own = {"decoders": settings["models"], "protocol": settings["what_if"]["protocol"]}
    lists = load(settings["experiment"], CONF, **{key: value for key, value in own.items() if value})
    cards = [Processor(name=name, **values) for name, values in settings["cards"].items()]
    reading = partial(read, sizes=settings["what_if"]["sizes"])
    experiment = Experiment(lists, reading, settings, Path(settings["results"]), settings["data_root"])
    found = plan_experiment(experiment, cards, settings)
    log.info("%s", plan_text(found, unplanned(CONF.parent)))
    return found


@script("plan")
def main(config: dict[str, Any]) -> None:
    found = plan(config)
    path = Path(config["json"] or f"outputs/plan/{found['experiment']}.json")
    write_atomically(path, json.dumps(found, indent=1) + "\n")
    log.info("%s", path)


if __name__ == "__main__":
    main()
