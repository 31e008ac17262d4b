"""Models and tokenizers from a local folder, the hub, or a configuration with random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sparsegrad import TruncatedLinear


def resolve(model: Mapping[str, Any], root: str | Path) -> tuple[str, dict[str, Any]]:
    """Where a checkpoint is: a folder given as ``checkpoint``, ``root/folder``, or the hub's name and revision.

    Args:
        model: the ``model`` group: name, checkpoint, revision, folder.
        root: ``data.root``.

    Returns:
        The path or hub name, and the keyword arguments that ``from_pretrained`` needs with it.

    Raises:
        ValueError: if neither a folder nor a hub name is there.
    """
    checkpoint, local = model["checkpoint"], Path(root) / model["folder"]
    if checkpoint is not None and Path(checkpoint).is_dir():
        return str(checkpoint), {"local_files_only": True}
    if local.is_dir():
        return str(local), {"local_files_only": True}
    if checkpoint is None:
        raise ValueError(f"{local} does not exist; the pretrain stage writes it: dvc repro pretrain.")
    if checkpoint.startswith(("/", "./", "../")):
        raise ValueError(
            f"model.checkpoint={checkpoint!r} is no folder; give a folder with config.json, or a hub name."
        )
    return checkpoint, {"revision": model["revision"]}


def load_tokenizer(model: Mapping[str, Any], root: str | Path) -> Any:
    """The model's tokenizer (``model.tokenizer`` names another folder or hub name).

    Raises:
        ValueError: if it can't be found.
    """
    from transformers import AutoTokenizer

    tokenizer = model.get("tokenizer")
    source, arguments = (tokenizer, {}) if tokenizer else resolve(model, root)
    try:
        found = AutoTokenizer.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {source}: {_first_line(error)} {_HINT}") from None
    # Without its files transformers 5 builds one from config.json alone, to which every word is unknown.
    if len(found) <= len(found.all_special_tokens):
        raise ValueError(f"no tokenizer at {source}: its files hold no vocabulary. {_HINT}")
    return found


def load_classifier(model: Mapping[str, Any], root: str | Path, num_labels: int, seed: int) -> nn.Module:
    """A sequence classifier in float32, on the CPU; with one label it does regression.

    The head (and, with ``random_weights`` in the ``model`` group, everything) is drawn from the seed.

    Raises:
        ValueError: if the checkpoint can't be found or read.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, model, root, seed, torch.float32, num_labels=num_labels)


def load_causal(
    model: Mapping[str, Any], root: str | Path, seed: int, dtype: torch.dtype | str = torch.float32
) -> nn.Module:
    """A causal language model, on the CPU; with ``random_weights`` it is drawn from the seed.

    Args:
        dtype: of loaded weights; ``auto`` takes the checkpoint's.

    Raises:
        ValueError: if the checkpoint can't be found or read, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, model, root, seed, dtype)


def _load(
    kind: Any, model: Mapping[str, Any], root: str | Path, seed: int, dtype: torch.dtype | str, **changes: Any
) -> nn.Module:
    from transformers import AutoConfig
    from transformers.utils import logging

    torch.manual_seed(seed)
    if model["random_weights"]:
        return kind.from_config(AutoConfig.for_model(**dict(model["architecture"]), **changes))
    source, arguments = resolve(model, root)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that a head is new is what fine-tuning means, not a warning
    try:
        with no_file_bars():
            found, loading = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **changes, **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"no model at {source}: {_first_line(error)} {_HINT}") from None
    finally:
        logging.set_verbosity(verbosity)
    head_is_new = "num_labels" in changes
    if not head_is_new and loading["missing_keys"]:  # from_pretrained would answer with random ones
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"{source} lacks {len(missing)} weights, the first {missing[0]}: train or fetch it again.")
    return found


@contextmanager
def no_file_bars() -> Iterator[None]:
    """Without transformers' progress bars over the files of a checkpoint, which break into those of a cell."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the parameters that are not trained in another precision; the trained ones keep theirs, float32.

    In bfloat16 a step below about 1e-3 of a weight would vanish, so only what never steps may be stored in it. A
    truncated layer that steps its frozen weight in place takes the side path from then on.
    """
    for module in model.modules():
        if isinstance(module, TruncatedLinear):
            module.store_weight(dtype)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def checkpoint_activations(model: nn.Module) -> None:
    """Keep the input of every block alone and compute the rest again in the backward pass.

    Non-reentrant: the reentrant form gives no gradient where a block's input needs none, as all do here.
    """
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # gradient_checkpointing_enable is its older name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def positions(model: nn.Module) -> int | None:
    """Tokens of the longest input that a model takes; None without a limit."""
    found = getattr(model.config, "max_position_embeddings", None)
    if found is not None and model.config.model_type == "roberta":
        return found - model.config.pad_token_id - 1  # its position ids begin after the padding id
    return found


def fingerprint(model: Mapping[str, Any], root: str | Path) -> str:
    """What identifies the starting weights: sha256 of a folder's safetensors, or the hub revision.

    Records and bases carry it, so that a basis of another model is refused.
    """
    if model["random_weights"]:
        return "random"
    source, arguments = resolve(model, root)
    if "revision" in arguments:
        return f"{source}@{arguments['revision']}"
    files = sorted(Path(source).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} has no *.safetensors file; weights in other formats are not read.")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


_HINT = (
    "Set data.root (or SPARSEGRAD_DATA) to a folder that experiments/fetch.py filled, or model.checkpoint to a folder."
)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
