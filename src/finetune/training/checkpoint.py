"""Checkpoints that a run can be continued from bit for bit: safetensors and JSON, written whole or not at all.

A checkpoint is a folder ``step_00000123``. It is written beside its final name, synced, and renamed; a manifest with
sizes and hashes tells a whole one from a broken one. Loading takes the newest whole one. Nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.store.files import sha256
from sparsegrad import sparsegrad_layers

log = logging.getLogger(__name__)

KEEP = 2
MANIFEST = "manifest.json"


def save_checkpoint(
    folder: str | Path,
    step: int,
    digest: str,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Mapping[str, Any],
    best: Mapping[str, Tensor] | None,
) -> None:
    """Write the state after an optimizer step, and drop all but the newest two checkpoints.

    Args:
        folder: of this run alone.
        step: optimizer steps done.
        digest: hash of the run's configuration.
        model, optimizer: their states are saved, random generators too; frozen parameters are left out, the run starts
            from them again.
        progress: JSON values.
        best: the best weights so far.
    """
    folder = Path(folder)
    final, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, {"step": step, "config_hash": digest, "progress": dict(progress)}, model, optimizer, best)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # of a full disk it takes the room that the rest needs
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        raise OSError(number, f"{reason} (the checkpoint before it is kept)", str(final)) from error
    _sync(folder)
    for old in sorted(folder.glob("step_*"))[:-KEEP]:
        shutil.rmtree(old)


def _write(
    folder: Path,
    content: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    best: Mapping[str, Tensor] | None,
) -> None:
    tensors, values = _pack_optimizer(optimizer)
    save_file(_unshared(_changing(model)), folder / "model.safetensors")
    save_file(tensors, folder / "optimizer.safetensors")
    save_file(_random_states(), folder / "random.safetensors")
    if best is not None:
        save_file(_unshared(best), folder / "best.safetensors")
    (folder / "state.json").write_text(json.dumps({**content, "optimizer": values}))
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def load_checkpoint(
    folder: str | Path, digest: str, model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, Any] | None, dict[str, Tensor] | None, int]:
    """Put the newest whole checkpoint into model, optimizer and random generators.

    A damaged one (a flipped byte, a lost file) is said in the log, and deleted: the run goes on from the one before it,
    or begins anew.

    Returns:
        Progress and best weights, both None if there is no whole checkpoint; and how many damaged ones were newer.

    Raises:
        ValueError: if the newest whole checkpoint is of another configuration, or of another model.
    """
    damaged = 0
    for path in sorted(Path(folder).glob("step_*"), reverse=True):
        if not _is_whole(path):
            log.warning("%s is damaged; the run goes on from the checkpoint before it, or begins anew", path)
            shutil.rmtree(path, ignore_errors=True)
            damaged += 1
            continue
        content = json.loads((path / "state.json").read_text())
        if content["config_hash"] != digest:
            raise ValueError(
                f"{path} is a checkpoint of configuration {content['config_hash']}, this run is {digest}: "
                f"delete {folder} to start anew, or restore the configuration."
            )
        _load_model(model, load_file(path / "model.safetensors"), path)
        _unpack_optimizer(optimizer, load_file(path / "optimizer.safetensors"), content["optimizer"])
        _set_random_states(load_file(path / "random.safetensors"))
        best = path / "best.safetensors"
        return content["progress"], load_file(best) if best.exists() else None, damaged
    return None, None, damaged


def remove_checkpoints(folder: str | Path) -> None:
    """Delete a finished run's checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that training changes, on the CPU, shared tensors once."""
    return {name: tensor.cpu() for name, tensor in _unshared(_changing(model)).items()}


def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a snapshot back."""
    _load_model(model, weights)


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """The state without frozen parameters: of LLaMa-2 they are 85 to 99.8 % of 27 GB.

    A weight that steps move in place without a gradient of its own (SparseGrad's truncated form) is none of them.
    """
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    layers = sparsegrad_layers(model)
    frozen -= {f"{name}.weight" for name, layer in layers.items() if layer.moves_weight}
    frozen |= {f"{name}.moved" for name in layers}  # for adapters, which no run here writes
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies; of tensors that share memory (tied weights, shared bases) the first name only."""
    seen: set[tuple[Any, ...]] = set()
    result = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tuple(tensor.shape), tensor.storage_offset())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        result[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return result


def _load_model(model: nn.Module, tensors: Mapping[str, Tensor], path: Path | str = "the snapshot") -> None:
    """Copy tensors in place: tied weights and shared bases follow, optimizers keep their parameters."""
    state = model.state_dict()
    other = [name for name, tensor in tensors.items() if name not in state or state[name].shape != tensor.shape]
    if other:
        raise ValueError(f"{path} holds {', '.join(other[:3])}, which this model has not, or in another shape.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().clone(memory_format=torch.contiguous_format)
            else:
                values[f"{index}.{key}"] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def _unpack_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **content["values"]}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for index in range(min(len(states) - 1, torch.cuda.device_count())):  # it may go on on another machine
        torch.cuda.set_rng_state(states[f"cuda{index}"], index)


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text())
        return bool(files) and all(
            (path / name).stat().st_size == facts["bytes"] and sha256(path / name) == facts["sha256"]
            for name, facts in files.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # a flipped bit of the manifest: any of these
        return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
