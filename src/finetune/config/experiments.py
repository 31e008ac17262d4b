"""Experiment files: ``experiments/*.yaml``, and the ``params.yaml`` that one is expanded into."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from finetune.config.types import Count, Group, Name, Seed, Text, Unique, Workers, refused


def _command(text: str) -> str:
    if not re.fullmatch(r"[\w ./:=,+-]+", text):
        raise refused("allowed: a command such as `accelerate launch`, without marks of the shell")
    return text


class ExperimentFile(Group):
    """What stands there has its right kind; what is missing is said by who needs it."""

    name: Name = "-"
    extends: Name | None = None
    protocol: Name = "-"
    scale: Name = "-"
    measurements: Name | None = None
    models: Unique[Name] = []
    data: Name = "-"
    tasks: Unique[Name] = []
    seeds: Unique[Seed] = []
    methods: Unique[Name] = []
    ablations: Unique[Name] = []
    ablation_models: Unique[Name] | None = None
    efficiency_models: Unique[Name] | None = None
    decoders: Unique[Name] = []
    decoder_seeds: Unique[Seed] | None = None
    decoder_ablations: Unique[Name] = []
    chat: Name = "-"
    questions: Name = "-"
    judge: Name = "-"
    launch: Annotated[Text, AfterValidator(_command)] = "python"
    workers: Workers = "auto"
    generate: bool = False
    pretrain: Unique[Name] = []
    stands_for: dict[Literal["bert_base", "roberta_base", "roberta_large", "llama2_7b"], Name | None] = {}
    tables: Unique[Count] | None = None
    figures: Unique[Name] | None = None
    stages: dict[str, Any] = {}
