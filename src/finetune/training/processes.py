"""The accelerator of a run: its device, precision and processes are those of the configuration and the launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from finetune.config.launch import processes

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""Ways of accelerate to cut a model apart, as ``ACCELERATE_USE_<name>`` asks for them."""

_OF_SEVERAL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def make_accelerator(device: str, precision: str) -> Accelerator:
    """An accelerator on ``auto``, ``cpu`` or ``cuda``.

    Of the environment it gets the number of processes, and ``accelerate launch --cpu``. What else stands there under
    ACCELERATE_ (accumulation, compilation, another precision or device) would change a run behind its configuration.

    Raises:
        ValueError: on ``cuda`` without a CUDA device or beside ``--cpu``, a launcher that cuts models
            apart, or processes that accelerate does not connect.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=auto or device=cpu.")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if device == "cuda" and on_cpu:
        raise ValueError("device=cuda, but ACCELERATE_USE_CPU is set: unset it, or use device=cpu.")
    if cut := [name for name in SHARDING if parse_flag_from_env(f"ACCELERATE_USE_{name}")]:
        raise ValueError(
            f"ACCELERATE_USE_{cut[0]} is set, but models are not cut apart here (FSDP, DeepSpeed, Megatron-LM): what "
            "works is data parallelism, accelerate launch --multi_gpu, or one process."
        )
    rank, count = processes()
    AcceleratorState._reset_state()  # it is one a process, and refuses the runs of another precision in a multirun
    with _environment(count):
        mixed = "bf16" if precision == "bf16" else "no"
        made = Accelerator(cpu=device == "cpu" or on_cpu, mixed_precision=mixed)
    if (made.process_index, made.num_processes) != (rank, count):
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={count} in the environment, but accelerate has process {made.process_index} "
            f"of {made.num_processes}: start by accelerate launch (on CPUs with device=cpu), or unset both."
        )
    return made


@contextmanager
def _environment(count: int) -> Iterator[None]:
    """The environment without ACCELERATE_*, and for one process without what means several."""
    hidden = [name for name in os.environ if name.startswith("ACCELERATE_") or (count == 1 and name in _OF_SEVERAL)]
    kept = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(kept)
