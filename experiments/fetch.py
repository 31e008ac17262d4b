"""Gets every model and dataset that an experiment names into data.root, at pinned revisions, checksums verified.

    python experiments/fetch.py experiment=experiments/local.yaml [data.root=/some/where] [dry_run=true] [verify=true]

A second run downloads nothing and verifies; a killed one goes on where it stopped. Exit code 0: all is complete.
"""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from finetune.fetch import fetching
from finetune.fetch.hub import FetchError
from finetune.runs.command import script
from finetune.store.experiment import read_experiment

log = logging.getLogger("fetch")

CONF = Path(__file__).resolve().parents[1] / "conf"


def read(path: Path) -> Mapping[str, Any]:
    """The content of a YAML file, interpolations left as they are."""
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "no YAML file"
        raise ValueError(f"there is no {path}; its folder has {there}")
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def wanted(experiment: Mapping[str, Any]) -> list[fetching.AnySource]:
    """The folders behind the names in an experiment file (`data`, `chat` and `questions`: one name or a list)."""
    encoders, decoders = (("models", "efficiency_models"), ("decoders",))
    groups: dict[str, tuple[str, ...]] = {"model": encoders + decoders, "data": (), "chat": (), "questions": ()}
    if any(experiment[key] for key in encoders):
        groups["data"] = ("data",)
    if experiment["decoders"]:
        groups |= {"chat": ("chat",), "questions": ("questions",)}
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for group, keys in groups.items():
        given = [experiment.get(key) or [] for key in keys]
        names = [name for names in given for name in ([names] if isinstance(names, str) else names)]
        found[group] = {name: read(CONF / group / f"{name}.yaml") for name in names}
    data = {(group, name): config for group in ("data", "chat") for name, config in found[group].items()}
    return fetching.sources(experiment, found["model"], data, found["questions"])


def run(config: Mapping[str, Any]) -> list[str]:
    """One fetch, dry run or verification; returns its errors, one line each, already logged."""
    file, verify, dry_run = (config[name] for name in ("experiment", "verify", "dry_run"))
    root, sources = Path(config["data"]["root"]), wanted(read_experiment(file))
    if not sources:
        log.info("nothing to fetch: the pipeline makes every model and dataset of %s itself", file)
        return []
    servers = fetching.Servers.of(sources, os.environ)
    if verify:
        items = [fetching.Item(source, root / source.folder, complete=True) for source in sources]
    else:
        items = fetching.plan(sources, root, servers)
        for item in items:
            log.log(logging.ERROR if item.error else logging.INFO, "%s", item)
        log.info("to download: %s, into %s", fetching.human(sum(item.missing for item in items)), root)
        fetching.check_room(items, root)
    errors = [item.error for item in items if item.error] if dry_run else fetching.fetch(items, servers)
    if not dry_run:
        log.info("%d of %d folders are complete under %s", len(items) - len(errors), len(items), root)
    return errors


@script("fetch")
def main(config: dict[str, Any]) -> None:
    """Runs it; errors become one line each and exit code 1."""
    try:
        failed = bool(run(config))
    except (FetchError, OSError) as error:
        log.error("%s", error)
        failed = True
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
