"""A configuration held against the schema: it is as it was, or one line says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune.config import groups, protocols, reports, scales, scripts

SCRIPTS: dict[str, Any] = {
    "glue": scripts.Glue,
    "chat": scripts.Dialogues,
    "efficiency": scripts.Efficiency,
    "energy": scripts.Energy,
    "mt_bench": scripts.MTBench,
    "judge_agreement": scripts.JudgeAgreement,
    "hosvd_cost": scripts.HosvdCost,
    "cost_curves": scripts.CostCurves,
    "pretrain": reports.Pretrain,
    "generate": reports.Generate,
    "report": reports.Report,
    "table": reports.Table,
    "figure": reports.Figure,
    "targets": reports.Targets,
    "examples": reports.Examples,
    "statistics": reports.Statistics,
    "fetch": reports.Fetch,
    "dashboard": reports.Dashboard,
    "plan": reports.Plan,
    "trust": reports.Trust,
}
"""The schema of each file that lies in ``conf`` itself and is a script's."""

GROUPS: dict[str, Any] = {
    "model": groups.Model,
    "method": groups.Method,
    "data": groups.Data,
    "chat": groups.Chat,
    "questions": groups.Questions,
    "judge": groups.Judge,
    "protocol": protocols.Protocol,
    "protocol/llama": protocols.ChatProtocol,
    "scale": scales.Scale,
    "scale/llama": scales.ChatScale,
    "scale/efficiency": scales.EfficiencyScale,
    "scale/energy": scales.EnergyScale,
    "scale/hosvd_cost": scales.HosvdScale,
    "scale/cost_curves": scales.CurveScale,
}
"""The schema of the files of each folder of ``conf``."""

SECRET = ("api_key_env", "base_url")
"""Options that a key may have slipped into: an error does not show them."""


def check_script(name: str, config: Mapping[str, Any]) -> None:
    """Check the whole configuration of a script; with the choices that a method makes for itself in its protocol.

    Args:
        name: of the file in ``conf``.
        config: plain dictionaries, interpolations resolved.

    Raises:
        ValueError: one line: which option, what was received, what is allowed.
    """
    check(SCRIPTS[name], config)
    own = config.get("method", {}).get("protocol")
    if own:
        check(type_of(SCRIPTS[name], "protocol"), _merged(config["protocol"], own), "method.protocol")


def check_group(group: str, content: Any, where: str = "", file: Any = None) -> None:
    """Check a file of a folder of ``conf``; arguments and errors as of :func:`check`."""
    check(GROUPS[group], content, where or ("" if file else group), file)


def check(kind: Any, value: Any, where: str = "", file: Any = None) -> None:
    """Check a value against a type of the schema. It stays as it is: nothing is filled in or turned into another type.

    Args:
        where: what the value is called in an error.
        file: that it was read from, named in an error.

    Raises:
        ValueError: one line: which option, what was received, what is allowed.
    """
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        named = f"{file}: " if file else ""
        raise ValueError(f"{named}{_line(first, where)}.{more}") from None


def type_of(script: Any, group: str) -> Any:
    """The type of a group in a script's schema."""
    return script.model_fields[group].annotation


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _line(error: Mapping[str, Any], where: str) -> str:
    place = [part for part in error["loc"] if not str(part).startswith("<")]
    what, told, received = error["type"], error.get("ctx", {}), error["input"]
    if what == "key":  # the place is that of the group
        place = [*place, told["key"]]
    if is_key := bool(place) and place[-1] == "[key]":
        place = place[:-2]
    key = where
    for part in place:
        text = str(part) if str(part).isprintable() else repr(part)
        key += f"[{text}]" if isinstance(part, int) else f".{text}" if key else text
    if what == "missing":
        return f"{key} is missing"
    allowed = _ALLOWED[what].format(**told) if what in _ALLOWED else error["msg"].replace("Input should be", "allowed:")
    if what == "key" or (isinstance(received, Mapping) and what == "refused"):  # a key's value may be a secret
        joined = "." if re.match(r"\w+=", allowed) else ": "  # an option of the group, or words
        return f"{key}{joined}{allowed}" if key else allowed
    shown = "(not shown)" if place and place[-1] in SECRET else repr(received)
    shown = shown if len(shown) < 80 else f"{shown[:76]}..."
    return f"{key} has the name {shown}; {allowed}" if is_key else f"{key}{'=' if key else ''}{shown}; {allowed}"


_ALLOWED = {
    "int_type": "allowed: a whole number",
    "float_type": "allowed: a number",
    "string_type": "allowed: a text",
    "bool_type": "allowed: true, false",
    "list_type": "allowed: a list",
    "dict_type": "allowed: a mapping",
    "model_type": "allowed: a mapping",
    "too_short": "allowed: at least {min_length}",
    "too_long": "allowed: at most {max_length}",
}
"""In the words of a configuration; where pydantic's fit, they stay."""


def _merged(choices: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The choices with the own ones in them; of a choice with parts, those parts that are named."""
    found = dict(choices)
    for name, value in own.items():
        parts = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if parts else value
    return found
