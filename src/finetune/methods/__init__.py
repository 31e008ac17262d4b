"""The methods of the comparison behind one interface; the training loop never asks which one it runs.

Every method is given the same targets and the same scope, so that they differ in one thing: how the weights of the MLP
matrices move. A method is a file in ``conf/method`` and a module with one subclass of
:class:`finetune.methods.base.Method`: ``base`` names the module, one of this package or another by its dotted path;
without it the file's ``name`` does.

A variant is a file with a ``name`` of its own, the ``base`` of another, and under ``protocol`` the choices in which it
departs from the protocol that all others follow.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from finetune.methods.base import Configuration, Method, Targets
from sparsegrad import Basis


def base_method(method: Mapping[str, Any]) -> str:
    """Which module implements a method's file: its ``base`` where it names one, else its ``name``.

    Raises:
        ValueError: if there is no such module, or it holds no method.
    """
    base = method.get("base", method["name"])
    _method_class(base)
    return base


def _method_class(base: str) -> type[Method]:
    own = "." not in base
    path = f"{__name__}.{base}" if own else base
    found: list[type[Method]] = []
    if not own or base in _modules():
        try:
            module = import_module(path)
        except ModuleNotFoundError as error:
            if not (error.name and path.startswith(error.name)):
                raise  # a package that the method needs
        else:
            classes = [value for value in vars(module).values() if isinstance(value, type)]
            found = [c for c in classes if issubclass(c, Method) and c.__module__ == path]
    if len(found) != 1:
        allowed = f"allowed: {', '.join(_modules())}, or the dotted path of a module with one class of Method"
        raise ValueError(f"method={base!r}; {allowed}.")
    return found[0]


def _modules() -> list[str]:
    shared = ("adapters", "base", "costs")
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in shared)


def deciding(method: Mapping[str, Any]) -> dict[str, Any]:
    """What of a method's file decides a run's numbers: all but how tables name and group it."""
    return {name: value for name, value in method.items() if name not in ("label", "control", "extends")}


def needs_bases(method: Mapping[str, Any]) -> bool:
    """Whether a method's file means one that rotates gradients."""
    return _method_class(method.get("base", method["name"])).needs_bases


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
    device: str = "cuda",
    seed: int = 0,
) -> Method:
    """The method that a configuration names.

    Args:
        method, model, protocol: the configuration groups.
        bases: by layer kind; a method that rotates gradients needs them.
        one_backward_a_step, device, seed: see :class:`finetune.methods.base.Configuration`.

    Raises:
        ValueError: on an unknown method, or one that refuses the configuration.
    """
    base = base_method(method)
    targets = build_targets(base, model, protocol)
    given = Configuration(method, model, protocol, targets, bases, one_backward_a_step, device, seed)
    return _method_class(base).from_config(given)


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
