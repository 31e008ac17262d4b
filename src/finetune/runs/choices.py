"""Values of a configuration that may differ by task or method, and the point that a run takes from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.methods import base_method


def for_task(value: Any, task: str) -> Any:
    """A value of ``conf/scale`` that may be one for all tasks, or a mapping from tasks, with ``default``, to values."""
    return value.get(task, value["default"]) if isinstance(value, Mapping) else value


def for_method(value: Any, method: Mapping[str, Any], option: str) -> Any:
    """A value for all methods, or a mapping from methods to values; a variant that it leaves out takes its base's.

    Raises:
        ValueError: if a mapping leaves both out.
    """
    if not isinstance(value, Mapping):
        return value
    own = next((name for name in (method["name"], base_method(method)) if name in value), None)
    if own is None:
        raise ValueError(f"{option} is given for {', '.join(value)}; method={method['name']} needs one too.")
    return value[own]


def check_point(found: Mapping[str, Any]) -> None:
    """Refuse what is no learning rate or batch size; a carried run has no schema to ask.

    Raises:
        ValueError: saying which, and what is allowed.
    """
    for name, kind, allowed in (("learning_rate", int | float, "a number"), ("batch_size", int, "a whole number")):
        value = found[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r}; allowed: {allowed} greater than 0.")
