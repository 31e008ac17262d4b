"""Send records to wandb after the fact, offline or online: what a cluster without a network made is not lost.

A ledger in wandb's folder, ``sent.json``, holds what was sent, by run id and content: sending twice sends nothing
twice, and a record that changed is sent again under its id. An offline run is read back from its file and compared
with what it stands for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.store import records
from finetune.tracking.mirror import Mirror
from finetune.tracking.offline_run import OfflineRun, offline_files, read_offline_run
from finetune.tracking.tracker import Tracker

log = logging.getLogger(__name__)

LEDGER = "sent.json"


def publish(mirrors: Iterable[Mirror], settings: Mapping[str, Any], *, progress_bar: bool = False) -> dict[str, int]:
    """Send what was not sent yet.

    Args:
        mirrors: of :mod:`finetune.tracking.mirror`.
        settings: ``mode``, ``folder`` and ``project``, as the group ``wandb`` of the configuration.

    Returns:
        How many were ``sent``, ``known`` (sent before) and ``skipped`` (wandb is disabled, absent, or failed).

    Raises:
        ValueError: on an unknown mode, or if an offline run's file differs from what was sent.
    """
    counts = {"sent": 0, "known": 0, "skipped": 0}
    path = Path(settings["folder"]) / LEDGER
    ledger = records.read_json(path) if path.is_file() else {}
    for mirror in tqdm(list(mirrors), desc="wandb", disable=not progress_bar):
        if ledger.get(mirror.id) == {"mode": settings["mode"], "content": mirror.digest}:
            counts["known"] += 1
            continue
        mode = send(mirror, settings)
        counts["skipped" if mode == "disabled" else "sent"] += 1
        if mode != "disabled":
            ledger[mirror.id] = {"mode": mode, "content": mirror.digest}
            records.write_json(path, ledger)
    return counts


def send(mirror: Mirror, settings: Mapping[str, Any]) -> str:
    """Send one run; returns how: ``online``, ``offline`` (online was not to be had), or ``disabled`` (not at all).

    Raises:
        ValueError: on an unknown mode, or if the offline run's file differs from what was sent.
    """
    tracker = Tracker(
        settings["mode"],
        settings["folder"],
        project=settings["project"],
        run_id=mirror.id,
        group=mirror.group,
        job_type=mirror.job_type,
        name=mirror.name,
        config=mirror.config,
        system=False,  # this machine is not the one that ran it; the record names that one
    )
    with tracker:
        for step, values in mirror.history:
            tracker.log(values, step)
        tracker.summary(mirror.summary)
        for artifact in mirror.artifacts:
            tracker.artifact(artifact)
        mode = tracker.mode if tracker.active else "disabled"
    if mode == "offline":
        written = offline_files(settings["folder"])[mirror.id][-1]
        wrong = differences(mirror, read_when_written(written))
        if wrong:
            raise ValueError(f"{written} is not what was sent: {'; '.join(wrong)}.")
    return mode


def read_when_written(path: Path, patience: float = 10.0) -> OfflineRun:
    """An offline run's file, read when its end is there, or after so many seconds.

    wandb's service writes it, and may still do so when ``finish`` has returned (seen with wandb 0.31).
    """
    until = time.monotonic() + patience
    while True:
        found = read_offline_run(path)
        if found.exit_code is not None or time.monotonic() > until:
            return found
        time.sleep(0.02)


def differences(mirror: Mirror, found: OfflineRun) -> list[str]:
    """In what an offline run differs from what it stands for; empty where it is the same.

    The summary of wandb also holds the last value of every metric, which is not compared.
    """
    names = {"id": mirror.id, "group": mirror.group, "job_type": mirror.job_type, "name": mirror.name}
    history = [{"step": step, **values} for step, values in mirror.history]
    artifacts = [(a.name, a.type, sorted(Path(file).name for file in a.files)) for a in mirror.artifacts]
    pairs = {
        "names": (names, {name: found.run.get(name) for name in names}),
        "config": (dict(mirror.config), found.config),
        "history": (history, found.history),
        "summary": (dict(mirror.summary), {name: found.summary.get(name) for name in mirror.summary}),
        "artifacts": (artifacts, [(a["name"], a["type"], a["files"]) for a in found.artifacts]),
        "exit code": (0, found.exit_code),
    }
    return [f"{what} {_short(there)}, not {_short(sent)}" for what, (sent, there) in pairs.items() if sent != there]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
