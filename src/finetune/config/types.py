"""The kinds of values that options have. Strict: True is no number, "3" no whole one, NaN and infinity are none."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Discriminator,
    Strict,
    StrictInt,
    Tag,
    model_validator,
)  # fmt: skip
from pydantic_core import PydanticCustomError

from finetune.config.names import NAME_RULE, is_name, method_modules

T = TypeVar("T")


class Group(BaseModel):
    """Options that stand together; another key than its fields is refused, with the nearest of them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _knows(cls, given: Any) -> Any:
        if cls.model_config.get("extra") != "forbid" or not isinstance(given, Mapping):
            return given
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in given:
            if key not in known:
                near = get_close_matches(str(key), known, 1, 0.5)
                text = f"there is no such option; {f'nearest: {near[0]}' if near else 'allowed: ' + ', '.join(known)}"
                raise PydanticCustomError("key", "{text}", {"text": text, "key": str(key)})
        return given


def refused(text: str) -> PydanticCustomError:
    """What a validator raises; ``text`` says what is allowed."""
    return PydanticCustomError("refused", "{text}", {"text": text})


def _name(text: str) -> str:
    if not is_name(text):
        raise refused(f"allowed: a name of {NAME_RULE}")
    return text


def _text(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise refused("allowed: a line of text")
    return text


def _within(path: str) -> str:
    if path.startswith(("/", "~")) or ".." in PurePosixPath(path).parts:
        raise refused("allowed: a path below its folder, not absolute and without '..'")
    return path


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise refused(f"allowed: a regular expression; this one is none: {error}") from None
    return text


def _layers(text: str) -> str:
    if "layer" not in re.compile(text).groupindex:
        raise refused(r"allowed: a regular expression with a group (?P<layer>\d+), the index of the block")
    return text


def _module(base: str) -> str:
    dotted = "." in base and all(part.isidentifier() for part in base.split("."))
    if not dotted and base not in method_modules():
        near = get_close_matches(base, method_modules(), 1)
        known = f"{', '.join(method_modules())}, or the dotted path of a module with one class of Method"
        raise refused(f"allowed: {known}{f'; nearest: {near[0]}' if near else ''}")
    return base


def _unique(values: list[Any]) -> list[Any]:
    seen = [value for value in values if isinstance(value, Hashable)]
    if len(set(seen)) < len(seen):
        raise refused("allowed: each only once")
    return values


def _rising(values: list[Any]) -> list[Any]:
    if values != sorted(set(values)):
        raise refused("allowed: values that rise")
    return values


def with_default(values: dict[str, Any]) -> dict[str, Any]:
    """A mapping from tasks to values, if it has one for the tasks that it does not name."""
    if "default" not in values:
        raise refused("allowed: one value, or a mapping from tasks to values with one for `default`")
    return values


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise refused("allowed: 64 hexadecimal digits")
    return text


def kind(value: Any) -> str:
    """The tag of a value, where an option takes several kinds; :mod:`finetune.config.check` shows none."""
    return "<mapping>" if isinstance(value, Mapping) else "<text>" if isinstance(value, str) else "<one>"


def kind_of_each(value: Any) -> str:
    """As :func:`kind`, of an option that takes one value or a mapping to values."""
    return "<mapping>" if isinstance(value, Mapping) else "<one>"


_Number = Annotated[float, Strict(), AllowInfNan(False)]
Count = Annotated[StrictInt, Ge(1)]
Whole = Annotated[StrictInt, Ge(0)]
Seed = Annotated[StrictInt, Ge(0), Lt(2**31)]
"""Of torch, numpy and Optuna alike; a loop may add to it or multiply it."""
Positive = Annotated[_Number, Gt(0)]
NotNegative = Annotated[_Number, Ge(0)]
Share = Annotated[_Number, Gt(0), Le(1)]
Fraction = Annotated[_Number, Ge(0), Le(1)]
Below1 = Annotated[_Number, Ge(0), Lt(1)]

Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, AfterValidator(_text)]
PathText = Text
"""A place of the user's own choice."""
Within = Annotated[str, AfterValidator(_text), AfterValidator(_within)]
"""A path below a folder that another option names."""
Pattern = Annotated[str, AfterValidator(_pattern)]
Layers = Annotated[str, AfterValidator(_pattern), AfterValidator(_layers)]
Module = Annotated[str, AfterValidator(_module)]
Sha256 = Annotated[str, AfterValidator(_sha256)]

Unique = Annotated[list[T], AfterValidator(_unique)]
Some = Annotated[list[T], Len(1), AfterValidator(_unique)]
Rising = Annotated[list[T], Len(1), AfterValidator(_rising)]
ForTask = Annotated[
    Annotated[T | None, Tag("<one>")] | Annotated[dict[Name, T | None], AfterValidator(with_default), Tag("<mapping>")],
    Discriminator(kind_of_each),
]
"""One value, or one for each task and ``default`` for the others; null leaves it to another place."""
ForMethod = Annotated[
    Annotated[T | None, Tag("<one>")] | Annotated[dict[Name, T], Len(1), Tag("<mapping>")],
    Discriminator(kind_of_each),
]
"""One value, or one for each method."""

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
Wandb = Literal["offline", "online", "disabled"]


class Pool(Group):
    """Who runs what is independent, and how many at a time. What ``slurm`` may hold is submitit's to check."""

    executor: Literal["local", "slurm"]
    count: Count
    slurm: dict[str, Any] = {}

    @model_validator(mode="after")
    def _asks_whom_it_names(self) -> Self:
        if self.slurm and self.executor != "slurm":
            raise refused(f"executor={self.executor!r} with options of slurm; allowed: executor: slurm")
        return self


Workers = Annotated[
    Annotated[Count, Tag("<one>")] | Annotated[Literal["auto"], Tag("<text>")] | Annotated[Pool, Tag("<mapping>")],
    Discriminator(kind),
]
