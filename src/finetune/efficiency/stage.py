"""One record of measurements on one machine: made once, found again, and taken up where a kill left it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from finetune.efficiency import machine
from finetune.store import records

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A record and its place.

    Attributes:
        path: of the record.
        kind: of the record.
        checkpoints: folder for finished parts, so that a killed stage goes on; emptied at the end.
        experiment, scale, version: for the record.
        progress: whether to show progress bars.
        named: what the record's ``run`` holds besides.
        commit: of a copy of the project that is no repository; a record of another commit is then made anew.
        alone: whether the caller has made sure that nothing else uses the device. What this process' own libraries and
            graphs take of it counts as others' otherwise.
    """

    path: Path
    kind: str = ""
    checkpoints: Path = Path("outputs/checkpoints")
    experiment: str = "hand"
    scale: str = "hand"
    version: int = 1
    progress: bool = True
    named: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    alone: bool = False

    @classmethod
    def from_config(cls, kind: str, config: Mapping[str, Any]) -> Self:
        """Of a composed ``conf/<kind>.yaml``."""
        folder = Path("results") / config["name"] if config["results"] else Path(config["output"])
        checkpoints = Path(config["checkpoints"]) / kind
        named = {"experiment": config["name"], "scale": config["scale"]["name"], "version": config["version"]}
        return cls(folder / f"{kind}.json", kind, checkpoints, **named, progress=config["progress"])

    def identity(self, content: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the numbers.

        Args:
            content: the request.
            facts: of the machine, :func:`finetune.efficiency.machine.facts`.
        """
        own: dict[str, Any] = {
            "version": self.version,
            "device": [facts["type"], facts["name"]],
            "torch": torch.__version__,
        }
        return {**own, **content}

    def run(
        self,
        content: Mapping[str, Any],
        measure: Callable[[torch.device, Path], Mapping[str, Any]],
        *,
        device: str,
        threads: int | None,
    ) -> dict[str, Any]:
        """Measure and write the record. A finished record of the same request and machine is not made again.

        Args:
            content: what is asked for.
            measure: from the device and a folder for finished parts to what the record holds besides, ``treatment``
                among it.
            device: ``auto``, ``cpu`` or ``cuda``.
            threads: of torch on the CPU; None leaves torch's choice.

        Raises:
            ValueError: if the device is missing or others use it.
        """
        found = machine.find_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        facts = machine.facts(found)
        identity = self.identity(content, facts)
        digest = records.config_hash(identity)
        folder = self.checkpoints / digest
        held = records.reusable(self.path, digest)
        if held and self.commit in (None, held["provenance"]["commit"]):
            log.info("%s is finished, reused", self.path)
            shutil.rmtree(folder, ignore_errors=True)  # a kill after the record leaves them
            return held
        before = machine.others(found)
        warnings = [] if self.alone else machine.check_alone(found, before)
        measured, after = measure(found, folder), machine.others(found)
        if after.get("other_bytes", 0) > machine.OTHERS and not self.alone:
            warnings.append(f"other processes took {after['other_bytes'] / 1e6:.0f} MB of the device while measuring")
        named = {"experiment": self.experiment, "kind": self.kind, **self.named, "scale": self.scale}
        record = {
            "schema": records.SCHEMA,
            "version": self.version,
            "status": "finished",
            "error": None,
            "run": named | {"config_hash": digest},
            "identity": identity,
            "device": facts | {"others_before": before, "others_after": after},
            "warnings": warnings,
            **measured,
            "provenance": records.provenance(commit=self.commit),
        }
        records.write_record(self.path, record)
        shutil.rmtree(folder, ignore_errors=True)
        return records.read_json(self.path)
