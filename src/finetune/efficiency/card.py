"""Ask a card everything in the minutes that it is there: python -m finetune.efficiency.card --minutes 9 --output DIR.

Most telling first. Every part writes its record when it is finished, is skipped where its record is there (of the same
request, device and commit), and is not begun where the minutes left don't hold it: several short calls add up. What is
written lies as under ``results/paper``. ``DIR/card.json`` says what each part took, and why one failed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.efficiency import machine
from finetune.efficiency.card_parts import SMOKE, Part, Sizes, plan
from finetune.efficiency.card_summary import summary
from finetune.efficiency.stage import Stage
from finetune.efficiency.timing import release
from finetune.store import records
from finetune.store.boundary import exit_with_message
from finetune.store.places import only_writer

log = logging.getLogger("finetune.efficiency")

CHECKPOINTS = Path("outputs/checkpoints")
LOG = "card.json"


@dataclass
class Card:
    """A device, and what it has been asked so far.

    Attributes:
        output: folder of the records.
        device: that is measured.
        commit: of the code; None where nobody knows.
        deadline: seconds since the epoch, after which nothing may run.
        now: the clock of the deadline.
        parts: name -> what became of a part, also of earlier calls: ``key``, ``seconds``, ``failed``.
    """

    output: Path
    device: torch.device
    commit: str | None
    deadline: float
    now: Callable[[], float] = time.time
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def key(self, part: Part) -> str:
        """What its record depends on."""
        name = machine.facts(self.device)["name"]
        return records.config_hash({"asked": part.asked, "device": name, "commit": self.commit})

    def is_finished(self, part: Part) -> bool:
        """Whether its record is there, of this request, device and commit."""
        known = self.parts.get(part.name, {})
        done = known.get("key") == self.key(part) and not known["failed"]
        return done and (self.output / part.path).is_file()

    def has_failed(self, part: Part) -> bool:
        """Whether it failed before, of this request, device and commit."""
        known = self.parts.get(part.name, {})
        return known.get("key") == self.key(part) and bool(known["failed"])

    def needed(self, part: Part) -> float:
        """Seconds that a part will take: as its like took last, or as was thought."""
        seen = [
            known["seconds"] for known in self.parts.values() if known["group"] == part.group and not known["failed"]
        ]
        return seen[-1] if seen else part.seconds

    def run(self, part: Part) -> bool:
        """Measure a part and note what it took.

        Returns:
            False where the device can't be used any more.
        """
        started, failed, usable = self.now(), None, True
        path = self.output / part.path
        named = {"experiment": "paper", "scale": "card", "progress": False, "checkpoints": CHECKPOINTS}
        try:
            part.run(Stage(path, part.name, **named, commit=self.commit, alone=True))
        except Exception as error:  # what one part meets is no reason to lose the others' minutes
            log.error("%s failed", part.name, exc_info=True)
            failed = f"{type(error).__name__}: {error}"[:500]
        try:
            release(self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            usable, failed = False, failed or f"{type(error).__name__}: {error}"[:500]
        seconds = self.now() - started
        self.parts.pop(part.name, None)
        self.parts[part.name] = {"key": self.key(part), "group": part.group, "seconds": seconds, "failed": failed}
        records.write_json(self.output / LOG, {"parts": self.parts})
        log.info("%s: %.1f s", part.name, seconds)
        return usable


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the minutes hold, and say what was measured and what is left.

    Raises:
        SystemExit: with one line of explanation, if an argument or a file is refused.
    """
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_with_message():
        device = machine.find_device("auto" if given.smoke else "cuda")
        parts = plan(records.PROJECT, device.type, SMOKE if given.smoke else Sizes(), given.rotation)
        parts = _only(parts, given.only)
        for warning in machine.check_alone(device, machine.others(device)):
            log.warning("%s", warning)
        output = Path(given.output)
        with only_writer(output, CHECKPOINTS):
            card = Card(output, device, _commit(given.commit), _started() + 60 * given.minutes, parts=_known(output))
            left = ask(card, parts)
        for line in summary(output, [part.path for part in parts], left):
            log.info("%s", line)


def ask(card: Card, parts: Sequence[Part]) -> dict[str, str]:
    """Measure what is missing and fits; those that failed before come last.

    Returns:
        Part -> why there is no record of it.
    """
    left = {}
    for part in sorted(parts, key=card.has_failed):
        if card.is_finished(part):
            log.info("%s is finished", part.name)
            continue
        seconds, needed = card.deadline - card.now(), card.needed(part)
        if needed > seconds:
            left[part.name] = f"needs about {needed:.0f} s, {max(0, seconds):.0f} s are left"
            continue
        log.info("%s: about %.0f of %.0f s", part.name, needed, seconds)
        usable = card.run(part)
        if card.parts[part.name]["failed"]:
            left[part.name] = card.parts[part.name]["failed"]
        if not usable:
            rest = [other.name for other in parts if not card.is_finished(other)]
            return dict.fromkeys(rest, "the device is lost to this process: call again") | left
    return left


def _only(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """The parts whose names begin so."""
    for name in names or ():
        if not any(part.name.startswith(name) for part in parts):
            raise ValueError(f"--only {name}; allowed are beginnings of: {', '.join(part.name for part in parts)}.")
    return [part for part in parts if names is None or part.name.startswith(tuple(names))]


def _commit(told: str | None) -> str | None:
    """The commit of the code: the repository's, or what is told of a copy that is none.

    Raises:
        ValueError: if they differ.
    """
    found = records.provenance(commit=told)["commit"]
    if told is not None and found != told:
        raise ValueError(f"--commit {told}, but the code lies in a repository at {found}: leave --commit out.")
    if found is None:
        log.warning("the code lies in no repository of its own: give --commit, or the records name none")
    return found


def _known(output: Path) -> dict[str, Any]:
    path = output / LOG
    found: Mapping[str, Any] = records.read_json(path) if path.is_file() else {"parts": {}}
    return dict(found["parts"])


def _started() -> float:
    """When this process began, in seconds since the epoch: its minutes hold its imports too."""
    import psutil  # accelerate needs it

    return psutil.Process().create_time()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.efficiency.card", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", required=True, type=float, help="no part is begun that would take longer")
    parser.add_argument("--output", required=True, help="folder of the records")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beginnings of the names of parts")
    parser.add_argument("--commit", help="of the code, where it lies in no repository of its own")
    parser.add_argument("--rotation", type=Path, help="folder with prepared inputs of finetune.efficiency.rotation")
    parser.add_argument("--smoke", action="store_true", help="tiny models, on a CPU too: only shows that it works")
    return parser


if __name__ == "__main__":
    main()
