"""Models and tokenizers from a local folder, the hub, or a configuration with random weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from finetune.fetch.fetching import source_of
from finetune.models.files import check_json, read_object, weight_files
from sparsegrad import TruncatedLinear

_LOCAL = {"local_files_only": True}
_SAFE = {"trust_remote_code": False}  # None, the default, would ask at the terminal


def resolve(model: Mapping[str, Any], root: str | Path) -> tuple[str, dict[str, Any]]:
    """Where a checkpoint is: a folder given as ``checkpoint``, ``root/folder``, or the hub's name and revision.

    Args:
        model: the ``model`` group: name, checkpoint, revision, folder.
        root: ``data.root``.

    Returns:
        The path or hub name, and the keyword arguments that ``from_pretrained`` needs with it.

    Raises:
        ValueError: if neither a folder nor a hub name is there, if a hub name has no commit, or if ``root/folder`` was
            fetched from another source.
    """
    checkpoint, local = model["checkpoint"], Path(root) / model["folder"]
    if checkpoint is None:
        if not local.is_dir():
            raise ValueError(f"{local} does not exist; the pretrain stage writes it: dvc repro pretrain.")
        return str(local), dict(_LOCAL)
    if checkpoint and Path(checkpoint).is_dir():
        return str(checkpoint), dict(_LOCAL)
    _check_hub_name("model.checkpoint", checkpoint)
    revision = model["revision"]
    if not revision:
        raise ValueError(
            f"model.checkpoint={checkpoint!r} is no folder, and a hub name needs model.revision, a commit: its weights "
            "may change."
        )
    if not local.is_dir():
        return checkpoint, {"revision": revision}
    wanted, fetched = f"{checkpoint}@{revision}", source_of(local)
    if fetched not in (None, wanted):
        raise ValueError(f"{local} holds {fetched}, not {wanted}: set model.checkpoint={local} to use it.")
    return str(local), dict(_LOCAL)


def _check_hub_name(option: str, name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"{option}={name!r} is no folder and no hub name; give a folder with config.json, or owner/name."
        ) from None


def load_tokenizer(model: Mapping[str, Any], root: str | Path) -> Any:
    """The model's tokenizer (``model.tokenizer`` names another folder or hub name), with ``model.chat_template``.

    Raises:
        ValueError: if it can't be found or read.
    """
    from transformers import AutoTokenizer

    source, arguments = model.get("tokenizer"), {}
    if not source:
        source, arguments = resolve(model, root)
    elif Path(source).is_dir():
        arguments = _LOCAL
    else:
        _check_hub_name("model.tokenizer", source)
    if arguments == _LOCAL:
        check_json(Path(source), "config.json", "tokenizer.json", "tokenizer_config.json")
    try:
        found = AutoTokenizer.from_pretrained(source, **_SAFE, **arguments)
    except Exception as error:  # whatever a file's content breaks: KeyError, or tokenizers' bare Exception
        raise ValueError(f"no tokenizer at {source}: {_reason(error)} {_HINT}") from None
    # Without its files transformers 5 builds one from config.json alone, to which every word is unknown.
    if len(found) <= len(found.all_special_tokens):
        raise ValueError(f"no tokenizer at {source}: its files hold no vocabulary. {_HINT}")
    if model.get("chat_template"):
        found.chat_template = model["chat_template"]
    return found


def load_classifier(
    model: Mapping[str, Any], root: str | Path, num_labels: int, seed: int, pad_token_id: int | None = None
) -> nn.Module:
    """A sequence classifier in float32, on the CPU; with one label it does regression.

    The head (and, with ``random_weights`` in the ``model`` group, everything) is drawn from the seed.

    Args:
        pad_token_id: what rows are padded with. A decoder judges its last token that is none; None leaves what
            config.json says.

    Raises:
        ValueError: if the checkpoint can't be found or read, or its weights are not the model's.
    """
    from transformers import AutoModelForSequenceClassification

    found: Any = _load(AutoModelForSequenceClassification, model, root, seed, torch.float32, num_labels=num_labels)
    if pad_token_id is not None:
        found.config.get_text_config().pad_token_id = pad_token_id
    return found


def load_causal(
    model: Mapping[str, Any], root: str | Path, seed: int, dtype: torch.dtype | str = torch.float32
) -> nn.Module:
    """A causal language model, on the CPU; with ``random_weights`` it is drawn from the seed.

    Args:
        dtype: of loaded weights; ``auto`` takes the checkpoint's.

    Raises:
        ValueError: if the checkpoint can't be found or read, or its weights are not the model's.
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
    if arguments == _LOCAL:
        check_json(Path(source), "config.json")
        weight_files(Path(source))
    # Other sizes would raise without the names. A pickle is never read.
    arguments |= _SAFE | {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that a head is new is what fine-tuning means, not a warning
    try:
        with no_file_bars():
            found, loading = kind.from_pretrained(source, dtype=dtype, **changes, **arguments)
    except Exception as error:  # whatever config.json breaks: KeyError, huggingface_hub's validation errors
        raise ValueError(f"no model at {source}: {_reason(error)} {_HINT}") from None
    finally:
        logging.set_verbosity(verbosity)
    _check_fit(found, loading, source, head_may_be_new="num_labels" in changes)
    return found


def _check_fit(model: Any, loading: Mapping[str, Any], source: str, head_may_be_new: bool) -> None:
    """Refuse weights that are not the model's: from_pretrained draws what is missing, and drops what is left."""
    body, missing = f"{model.base_model_prefix}.", set(loading["missing_keys"])
    if head_may_be_new:
        missing -= _new_head(list(model.state_dict()), body, missing)
    parts = dict(getattr(model, model.base_model_prefix).named_children())
    faults = {
        "missing": missing,
        "of another size": {name for name, *_ in loading["mismatched_keys"]},
        "of no layer": {n for n in loading["unexpected_keys"] if n.removeprefix(body).partition(".")[0] in parts},
        "not loaded": set(loading["error_msgs"]),
    }
    told = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
    if told:
        raise ValueError(
            f"{source}: its weights are not those of a {type(model).__name__} with its config.json: "
            f"{'; '.join(told)}. Fetch or train it again, or give another model.checkpoint."
        )


def _new_head(names: list[str], body: str, missing: set[str]) -> set[str]:
    """Layers behind the body, each missing as a whole: the last one, and with it those before that are new too.

    A pooler counts as one: masked language models have none.
    """
    head: dict[str, set[str]] = {}
    for name in names:
        if not name.startswith(body) or name.startswith(f"{body}pooler"):
            head.setdefault(name.removeprefix(body).partition(".")[0], set()).add(name)
    last = list(head.values())[-1]
    return set().union(*(layer for layer in head.values() if layer <= missing)) if last <= missing else set()


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)


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


def store_trained(model: nn.Module) -> None:
    """Store the parameters that are to be trained in float32, before a method prepares them; see `cast_frozen`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


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


def contents(model: Mapping[str, Any], root: str | Path) -> dict[str, str]:
    """What identifies a starting model: ``sha256``, its fingerprint, and of a folder what its configuration says.

    That is ``config_sha256`` and, where there is one, ``generation_config_sha256``, which a merged model inherits.
    Activation, dropout and epsilons stand in the configuration alone. Of its entries those that say where a file came
    from decide nothing. A commit of the hub holds it too; of random weights the ``model`` group says all.

    Raises:
        ValueError: if files are missing or damaged.
    """
    found = {"sha256": fingerprint(model, root)}
    if model["random_weights"]:
        return found
    source, arguments = resolve(model, root)
    if "revision" in arguments:
        return found
    for name in ("config", "generation_config"):
        path = Path(source) / f"{name}.json"
        if name == "config" or path.exists():
            deciding = {key: value for key, value in read_object(path).items() if key not in _ORIGIN}
            text = json.dumps(deciding, sort_keys=True)
            found[f"{name}_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return found


_ORIGIN = ("_name_or_path", "_from_model_config", "transformers_version")


def fingerprint(model: Mapping[str, Any], root: str | Path) -> str:
    """What identifies the starting weights: sha256 of a folder's safetensors, or the hub's name and commit.

    Records and bases carry it, so that a basis of another model is refused. A branch of the hub is no content: its
    commit is.
    """
    if model["random_weights"]:
        return "random"
    source, arguments = resolve(model, root)
    if "revision" in arguments:
        return f"{source}@{_commit(source, arguments['revision'])}"
    digest = hashlib.sha256()
    for file in weight_files(Path(source)):
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def _commit(name: str, revision: str | None) -> str:
    """The commit of the hub that a revision means, from the cache or the hub."""
    from transformers.utils.hub import cached_file

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:
        return Path(str(cached_file(name, "config.json", revision=revision))).parent.name
    except (OSError, ValueError) as error:
        raise ValueError(f"no model at {name}: {_reason(error)} {_HINT}") from None


_HINT = (
    "Set data.root (or SPARSEGRAD_DATA) to a folder that experiments/fetch.py filled, or model.checkpoint to a folder."
)


def _reason(error: Exception) -> str:
    """What an error says first, and its kind where that alone says little."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (
        said if isinstance(error, OSError | ValueError | RuntimeError) and said else f"{type(error).__name__}: {said}"
    )
