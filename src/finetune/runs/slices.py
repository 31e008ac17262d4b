"""An experiment's searches and runs, the most telling first, for some minutes at a time.

    python -m finetune.runs.slices params.yaml --minutes 9 [--dvc]

What is finished is kept, what runs when the time is over goes on from its checkpoint at the next call. With ``--dvc``
the bases and what they need are made before, and the other stages after all runs, within the same minutes.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from finetune.runs.cells import Cell, Outcome, in_order, run_cells
from finetune.store.boundary import exit_with_message
from finetune.store.files import read_yaml
from finetune.store.places import Busy

log = logging.getLogger(__name__)
ENDING = 60.0
"""Seconds that a stage has to end when its time is over."""


def composed_cells(params: str | Path, folder: Path = Path()) -> list[dict[str, Any]]:
    """The configuration of every cell of an experiment, as the command of its stage in dvc.yaml has it.

    Args:
        params: the experiment, expanded.
        folder: of ``dvc.yaml`` and ``conf``.

    Raises:
        ValueError: as :func:`finetune.runs.command.compose`.
    """
    from finetune.runs.command import compose
    from finetune.store.experiment import read_experiment

    experiment = read_experiment(params)
    command = read_yaml(folder / "dvc.yaml")["stages"]["train"]["do"]["cmd"]
    found = []
    for entry in experiment["stages"]["train"].values():
        words = shlex.split(_filled(command, experiment | entry))
        name, *overrides = words[words.index("--config-name") + 1 :]
        given = [f"cell={params}" if override.startswith("cell=") else override for override in overrides]
        found.append(compose(name, given, folder / "conf"))
    return found


def _filled(command: str, values: Mapping[str, Any]) -> str:
    """A command with DVC's ``${name}`` and ``${item.name}`` filled in."""
    return re.sub(r"\$\{(?:item\.)?(\w+)\}", lambda found: str(values[found[1]]), command)


def run_slice(cells: Sequence[Cell], deadline: float | None = None) -> Outcome:
    """Do what is missing of an experiment's cells until the time is over. One that another process has is left to it.

    Args:
        cells: of one experiment; they may share what they load.
        deadline: ``time.time()`` when the time is over; None: it never is.

    Raises:
        ValueError: if a seed was a search's, on bad configuration or data, or if a worker's process died.
    """
    for cell in cells:
        cell.check_seeds()
    held = []
    with ExitStack() as stack:
        for cell in cells:
            try:
                stack.enter_context(cell.writer())
                held.append(cell)
            except Busy as error:
                log.warning("left out: %s", error)
        outcome = run_cells(held, deadline) if held else Outcome([], {})
    return outcome if len(held) == len(cells) else Outcome(in_order(cells), outcome.found, over=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("params", type=Path, help="the experiment, expanded")
    parser.add_argument("--minutes", type=float, help="when to end; none: when all is done")
    parser.add_argument("--dvc", action="store_true", help="the stages before and after too")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    with exit_with_message():
        _run(given.params, None if given.minutes is None else time.time() + 60 * given.minutes, given.dvc)


def _run(params: Path, deadline: float | None, dvc: bool) -> None:
    if dvc and not _repro(deadline, "basis"):
        return
    loads: dict[str, Any] = {}
    outcome = run_slice([Cell.of(config, loads) for config in composed_cells(params)], deadline)
    failed, works = len(outcome.failed()), len(outcome.works)
    log.info("%d of %d searches and runs are done, %d failed", len(outcome.found) - failed, works, failed)
    if outcome.over:
        log.info("%d are left: run again to go on", len(outcome.left))
        return
    outcome.check()
    if dvc:
        from finetune.store.dvc_stages import commit_complete
        from finetune.store.experiment import read_experiment

        commit_complete(read_experiment(params))
        _repro(deadline)


def _repro(deadline: float | None, *stages: str) -> bool:
    """Let DVC make stages, and end it, with all that it started, when the time is over. Whether it came to its end.

    Raises:
        SystemExit: if a stage failed.
    """
    process = subprocess.Popen([sys.executable, "-m", "dvc", "repro", *stages], start_new_session=True)
    try:
        code = process.wait(None if deadline is None else max(0.0, deadline - time.time()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, KeyboardInterrupt):
            raise
        log.info("the time is over: run again to go on; with more minutes if this stage needs them")
        return False
    if code:
        raise SystemExit(code)
    return True


if __name__ == "__main__":
    main()
