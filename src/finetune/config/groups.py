"""What is trained, by what, on what, and how it is asked and judged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from annotated_types import Gt, Len, Lt
from pydantic import AfterValidator, ConfigDict, Discriminator, Tag, model_validator

from finetune.config.types import (
    Below1,
    Count,
    Group,
    Layers,
    Module,
    Name,
    NotNegative,
    PathText,
    Pattern,
    Positive,
    Seed,
    Sha256,
    Some,
    Text,
    Unique,
    Whole,
    Within,
    refused,
)  # fmt: skip


class Architecture(Group):
    """Of ``conf/model``: arguments of a transformers configuration; those that sizes are read from are checked."""

    model_config = ConfigDict(extra="allow")

    model_type: Text
    vocab_size: Count | None = None
    hidden_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    intermediate_size: Count | None = None
    max_position_embeddings: Count | None = None


class Model(Group):
    """A file of ``conf/model``; a decoder's has a ``template``."""

    name: Name
    title: Text
    checkpoint: PathText | None
    revision: Text | None
    folder: Within
    files: Unique[Within]
    checksums: dict[Within, Sha256] = {}
    tokenizer: PathText | None = None
    random_weights: bool
    architecture: Architecture | None
    target_modules: Annotated[dict[Name, Layers], Len(1)]
    optional_modules: dict[Name, Layers] = {}
    layers_to_transform: Some[Whole] | None
    lora_rank: Count
    k: Count | None
    template: Text | None = None
    chat_template: Annotated[str, Len(1)] | None = None


class Refresh(Group):
    """Of a method with ``form: truncated``."""

    steps: Count
    batches: Count
    state: Literal["carry", "reset"] = "carry"


class OtherMethod(Group):
    """A file of ``conf/method``; one of a module from elsewhere may hold options of its own."""

    model_config = ConfigDict(extra="allow")

    name: Name
    label: Text = "-"
    base: Module = "full"
    control: bool = False
    extends: Name = "-1"
    protocol: dict[str, Any] = {}


class FullMethod(OtherMethod):
    """A file of ``conf/method`` with the base ``full``."""

    model_config = ConfigDict(extra="forbid")

    train_targets: bool = True


class MePropMethod(OtherMethod):
    """A file of ``conf/method`` with the base ``meprop``."""

    model_config = ConfigDict(extra="forbid")


class PeftMethod(OtherMethod):
    """A file of ``conf/method`` with the base ``peft`` or ``lora``; PEFT checks ``arguments``."""

    model_config = ConfigDict(extra="forbid")

    config: Text = "LoraConfig"
    arguments: dict[str, Any] = {}
    dropout: Below1 = 0.0
    match: Name | None = None
    seeded: Name | None = None
    freeze: list[Pattern] = []

    @model_validator(mode="after")
    def _chooses_once(self) -> Self:
        for option in ("match", "seeded"):
            if (name := getattr(self, option)) in self.arguments:
                raise refused(f"{option}={name} sets this argument; arguments gives it too: leave one of them out")
        return self


class RandomEntriesMethod(OtherMethod):
    """A file of ``conf/method`` with the base ``random_entries``."""

    model_config = ConfigDict(extra="forbid")

    redraw: bool = False


class SparseGradMethod(OtherMethod):
    """A file of ``conf/method`` with the base ``sparsegrad``."""

    model_config = ConfigDict(extra="forbid")

    form: Literal["folded", "rotated", "truncated"]
    matmul: Literal["regular", "sparse_by_dense"]
    core: Literal["square", "input"] = "square"
    basis_seed: Seed | None = None
    drop_after: Count | None = None
    select: Text = "-"
    select_in: Literal["auto", "step", "backward"] = "auto"
    rotation: Literal["auto", "float32", "tf32", "bf16"] = "auto"
    refresh: Refresh | None = None

    @model_validator(mode="after")
    def _refreshes(self) -> Self:
        if self.refresh is not None and self.form != "truncated":
            raise refused(f"refresh renews the bases of form=truncated; this method has form={self.form}")
        return self


_METHODS = {name: name for name in ("full", "meprop", "peft", "random_entries", "sparsegrad")} | {"lora": "peft"}


def _base(method: Any) -> str:
    base = (method.get("base") or method.get("name")) if isinstance(method, Mapping) else None
    return f"<{_METHODS.get(str(base), 'other')}>"


Method = Annotated[
    Annotated[FullMethod, Tag("<full>")]
    | Annotated[MePropMethod, Tag("<meprop>")]
    | Annotated[PeftMethod, Tag("<peft>")]
    | Annotated[RandomEntriesMethod, Tag("<random_entries>")]
    | Annotated[SparseGradMethod, Tag("<sparsegrad>")]
    | Annotated[OtherMethod, Tag("<other>")],
    Discriminator(_base),
]
"""A file of ``conf/method``, by what implements it."""


class Task(Group):
    """An entry of ``tasks`` in ``conf/data``."""

    title: Text = "-"
    columns: Annotated[Some[Text], Len(1, 2)]
    num_labels: Count
    metric: Literal["accuracy", "matthews_correlation", "pearson", "f1"]
    validation: Name = "validation"
    label_range: Annotated[list[float], Len(2, 2)] | None = None

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.label_range is not None and not self.label_range[0] < self.label_range[1]:
            raise refused(f"label_range={self.label_range}; allowed: [low, high], low < high")
        return self


class Source(Group):
    """Where ``experiments/fetch.py`` gets a data group from."""

    name: Name
    root: PathText
    folder: Within
    source: Text | None
    revision: Text | None
    checksums: dict[Within, Sha256] = {}


class Data(Source):
    """A file of ``conf/data``."""

    task: Name
    tasks: Annotated[dict[Name, Task], Len(1)]

    @model_validator(mode="after")
    def _has_the_task(self) -> Self:
        if self.task not in self.tasks:
            raise refused(f"task={self.task!r}; {self.name} has: {', '.join(sorted(self.tasks))}")
        return self


class Chat(Source):
    """A file of ``conf/chat``."""

    files: Unique[Within]
    languages: Some[Text] | None
    threads: Literal["all", "best"]
    deleted: Literal["keep", "drop"]
    review: Literal["all", "passed"]
    validation_share: Annotated[float, Gt(0), Lt(1)]


class QuestionSource(Group):
    """A single file of GitHub."""

    repo: Text
    revision: Text
    path: Within
    file: Within
    sha256: Sha256


class Questions(Group):
    """A file of ``conf/questions``."""

    name: Name
    title: Text
    root: PathText
    folder: Within
    questions: Within
    judge_prompts: Within
    references: Within | None
    reference_source: Literal["questions", "file"]
    examples: Unique[Whole]
    sources: list[QuestionSource]


def _variable(text: str) -> str:
    if not re.fullmatch("[A-Z]+(_[A-Z0-9]+)*", text) or len(text) > 80:  # what keys look like is no such name
        raise refused(
            "allowed: the name of an environment variable in capital letters, such as OPENAI_API_KEY, which holds the "
            "key; never the key itself"
        )
    return text


def _address(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@:][^\s/?#@]*(/[^\s?#@]*)?", url):
        raise refused(
            "allowed: an address such as http://127.0.0.1:8000/v1, without user, password, query or fragment: a key "
            "goes into the environment variable that judge.api_key_env names"
        )
    return url


class JudgeEndpoint(Group):
    """How a judge is asked, and its words are read."""

    model: Text
    base_url: Annotated[str, AfterValidator(_address)]
    api_key_env: Annotated[str, AfterValidator(_variable)] | None
    temperature: NotNegative | None
    max_tokens: Count | None
    token_parameter: Literal["max_tokens", "max_completion_tokens"]
    timeout: Positive
    max_retries: Whole
    parallel: Count
    repeats: Count
    measures_quality: bool
    parsing: Literal["last", "fastchat"]


class Judge(JudgeEndpoint):
    """A file of ``conf/judge``."""

    name: Name
    base_url: Annotated[str, AfterValidator(_address)] | None
    serve: bool
    allowed_failures: Whole

    @model_validator(mode="after")
    def _is_reached(self) -> Self:
        if self.serve and self.measures_quality:
            raise refused("the local judge's ratings are no measure of quality: set judge.measures_quality=false")
        if not self.serve and self.base_url is None:
            raise refused("base_url=None; allowed: the judge's address, or serve=true")
        return self
