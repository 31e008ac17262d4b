"""What the environment says of the processes of one run. Needs neither torch nor accelerate."""

from __future__ import annotations

import os


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes, as ``accelerate launch`` and torchrun set them; else 0 and 1.

    RANK, LOCAL_RANK and the variables of MPI mean nothing without WORLD_SIZE: a pod or an earlier shell left them.

    Raises:
        ValueError: if WORLD_SIZE is above 1 and RANK is no rank below it.
    """
    count, rank = (os.environ.get(name, "").strip() for name in ("WORLD_SIZE", "RANK"))
    if count in ("", "0", "1"):
        return 0, 1
    if not (count.isdecimal() and rank.isdecimal() and int(rank) < int(count)):
        raise ValueError(
            f"WORLD_SIZE={count!r} with RANK={rank!r} in the environment; accelerate launch sets both, RANK from 0: "
            "start by it, or unset both for one process."
        )
    return int(rank), int(count)


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return processes()[0] == 0
