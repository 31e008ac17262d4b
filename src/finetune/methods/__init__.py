"""The four methods of the paper behind one interface; the training loop never asks which one it runs.

Every method is given the same targets and the same scope, so that they differ in one thing: how the weights of the MLP
matrices move.

A variant is a method's file in ``conf/method`` with a ``name`` of its own, ``base``, the method that implements it, and
under ``protocol`` the choices in which it departs from the protocol that all others follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.methods.base import Method, Targets
from finetune.methods.full import FullFineTuning
from finetune.methods.lora import LoRA
from finetune.methods.meprop import MeProp
from finetune.methods.sparsegrad import SparseGrad
from sparsegrad import Basis

__all__ = [
    "METHODS",
    "FullFineTuning",
    "LoRA",
    "MeProp",
    "Method",
    "SparseGrad",
    "Targets",
    "base_method",
    "build_method",
    "build_targets",
    "deciding",
    "needs_bases",
    "with_own_choices",
]

METHODS = ("full", "lora", "meprop", "sparsegrad")


def base_method(method: Mapping[str, Any]) -> str:
    """Which of :data:`METHODS` a method's file means: its ``base`` where it is a variant, else its ``name``.

    Raises:
        ValueError: if it is none of them.
    """
    base = method.get("base", method["name"])
    if base not in METHODS:
        raise ValueError(f"method={base!r}; allowed: {', '.join(METHODS)}.")
    return base


def deciding(method: Mapping[str, Any]) -> dict[str, Any]:
    """What of a method's file decides a run's numbers: all but how tables name and group it."""
    return {name: value for name, value in method.items() if name not in ("label", "control", "extends")}


def needs_bases(method: Mapping[str, Any]) -> bool:
    """Whether a method's file means one that rotates gradients."""
    return base_method(method) == "sparsegrad"


def with_own_choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the choices that a variant makes for itself put into its protocol.

    Of a choice with parts, such as ``preliminary``, the parts that the variant names.

    Raises:
        ValueError: if a choice is none that the protocol has.
    """
    own = config.get("method", {}).get("protocol", {})
    return {**config, "protocol": _replaced(config["protocol"], own, config.get("method", {}).get("name"))}


def _replaced(
    choices: Mapping[str, Any], own: Mapping[str, Any], method: str | None, where: str = ""
) -> dict[str, Any]:
    found = dict(choices)
    for name, value in own.items():
        if name not in choices:
            raise ValueError(f"method {method} sets protocol.{where}{name}; allowed: {list(choices)}.")
        parts = isinstance(value, Mapping) and isinstance(choices[name], Mapping) and choices[name]
        found[name] = _replaced(choices[name], value, method, f"{where}{name}.") if parts else value
    return found


def build_method(
    method: Mapping[str, Any],
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    *,
    bases: Mapping[str, Basis] | None = None,
    one_backward_a_step: bool = False,
) -> Method:
    """The method that a configuration names.

    Args:
        method, model, protocol: the configuration groups.
        bases: by layer kind; SparseGrad needs them.
        one_backward_a_step: no accumulation and one process, so that a gradient may be selected in the backward pass.

    Raises:
        ValueError: on an unknown method, or SparseGrad without bases.
    """
    name = base_method(method)
    targets = build_targets(name, model, protocol)
    k, density = model["k"], protocol["density"]
    if name == "full":
        return FullFineTuning(targets, train_targets=method.get("train_targets", True))
    if name == "lora":
        rank, alpha = model["lora_rank"], lora_alpha(protocol["lora_scale"], model["lora_rank"])
        return LoRA(targets, rank=rank, alpha=alpha, dropout=protocol.get("lora_dropout", method["dropout"]))
    if name == "meprop":
        return MeProp(targets, k=k, density=density, optimizer_rule=protocol["meprop_optimizer"])
    if bases is None:
        raise ValueError(f"method={method['name']} needs bases: run the gradients and basis stages, or set basis=PATH.")
    return SparseGrad(
        targets,
        bases=bases,
        k=k,
        density=density,
        orientation=protocol["orientation"],
        basis_seed=method.get("basis_seed"),
        drop_after=method.get("drop_after"),
        form=method["form"],
        matmul=method["matmul"],
        core=method.get("core", "square"),
        select_in="backward" if one_backward_a_step else "step",
    )


def build_targets(method: str, model: Mapping[str, Any], protocol: Mapping[str, Any]) -> Targets:
    """The matrices that a method treats, by the model's patterns and the protocol's choices.

    A decoder's protocol may list methods under ``gate`` (they treat ``gate_proj`` like up and down), ``also_train``
    (they train it as a whole beside them: D17, D19) and ``every_block`` (they treat all blocks: D18).

    Raises:
        ValueError: if a choice needs a pattern that the model has not.
    """
    modules, layers, also = dict(model["target_modules"]), model["layers_to_transform"], {}
    gate = {"gate": model.get("optional_modules", {}).get("gate")}
    gated, whole = (method in protocol.get(key, ()) for key in ("gate", "also_train"))
    if (gated or whole) and gate["gate"] is None:
        raise ValueError(f"protocol asks for gate_proj in method={method}; model {model['name']} names no such module.")
    if gated:
        modules |= gate
    elif whole:
        also = gate
    return Targets(
        target_modules=modules,
        layers_to_transform=None if method in protocol.get("every_block", ()) else layers,
        scope=protocol["train"],
        frozen=tuple(protocol["frozen"].get(method, ())),
        also_train=also,
    )


def lora_alpha(scale: str | float, rank: int) -> float:
    """PEFT's alpha for ``protocol.lora_scale``, which is alpha / rank (D12).

    Raises:
        ValueError: if the scale is neither ``inverse_rank`` nor a positive number.
    """
    if scale == "inverse_rank":
        return 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise ValueError(f"protocol.lora_scale={scale!r}; allowed: inverse_rank, or a positive number (alpha / rank).")
    return scale * rank
