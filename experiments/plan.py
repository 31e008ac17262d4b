"""What the LLaMa cells of an experiment need, before anything runs: memory against a card's, disk, judge calls.

python experiments/plan.py experiment=experiments/paper.yaml [json=outputs/plan.json] [card.memory=80.0e9]
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import DictConfig

from finetune.files import write_atomically
from finetune.plan import Card, lines, plan_model

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[1] / "conf"


def read(group: str, name: str) -> Mapping[str, Any]:
    """A configuration group's file."""
    path = CONF / group / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "nothing"
        raise ValueError(f"there is no {path.relative_to(CONF.parent)}; its folder has {there}.")
    return yaml.safe_load(path.read_text())


def plan(cfg: DictConfig) -> dict[str, Any]:
    """The plan of every model, logged and returned."""
    path = Path(cfg.experiment)
    if not path.is_file():
        raise ValueError(f"there is no {path}; give an experiment file: experiment=experiments/paper.yaml.")
    experiment = yaml.safe_load(path.read_text())
    models = cfg.models or experiment.get("llama_models")
    if not models:
        raise ValueError(f"{path} names no llama_models; give some: models=[llama2_7b].")
    card = Card(cfg.card.name, cfg.card.memory, cfg.card.reserve)
    found: dict[str, Any] = {"experiment": experiment["name"], "card": dict(cfg.card), "models": {}}
    for name in models:
        found["models"][name] = plan_model(
            read("model", name),
            {method: read("method", method) for method in experiment.get("llama_methods") or experiment["methods"]},
            read("protocol/llama", experiment["protocol"]),
            read("scale/llama", experiment["scale"]),
            seeds=len(experiment.get("llama_seeds") or experiment["seeds"]),
            questions=cfg.questions,
            turns=cfg.turns,
            touched=cfg.touched,
            card=card,
        )
        for line in lines(name, found["models"][name], card):
            log.info("%s", line)
    return found


@hydra.main(version_base=None, config_path="../conf", config_name="plan")
def main(cfg: DictConfig) -> None:
    try:
        found = plan(cfg)
        if cfg.json:
            write_atomically(cfg.json, json.dumps(found, indent=2) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
