"""The configuration of scripts that train and measure nothing: data and models made or fetched, plan, tables, page."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len
from pydantic import Discriminator, Field, Tag

from finetune.config.groups import Model, Questions
from finetune.config.types import (
    Below1,
    Count,
    Fraction,
    Group,
    Name,
    NotNegative,
    PathText,
    Positive,
    Seed,
    Share,
    Some,
    Text,
    Unique,
    Whole,
    Workers,
    kind,
)  # fmt: skip


class EncoderPretraining(Group):
    """Of ``conf/pretrain.yaml``."""

    vocab_size: Count
    steps: Count
    batch_size: Count
    learning_rate: Positive
    warmup: Share
    beta2: Below1


class DecoderPretraining(EncoderPretraining):
    """Of ``conf/pretrain.yaml``."""

    length: Annotated[int, Ge(3)]


class Pretrain(Group):
    """``conf/pretrain.yaml``."""

    name: Name
    seed: Seed
    device: Literal["cpu", "cuda"]
    threads: Count | None
    progress: bool
    model: Model
    encoder: EncoderPretraining
    decoder: DecoderPretraining


class GenerateGlue(Group):
    """Of ``conf/generate.yaml``."""

    corpus_sentences: Count
    tasks: Unique[Literal["cola", "mrpc", "stsb"]]
    train: Count
    validation: Count


class GenerateChat(Group):
    """Of ``conf/generate.yaml``."""

    trees: Count
    dialogues: Count


class Generate(Group):
    """``conf/generate.yaml``."""

    name: Name
    seed: Seed
    glue: GenerateGlue
    chat: GenerateChat


class Report(Group):
    """``conf/report.yaml``; its name and experiment are those of all scripts that make a part of the report."""

    name: Name
    experiment: PathText
    figures: dict[Name, Text]
    output: PathText | None


class Table(Group):
    """``conf/table.yaml``."""

    name: Name
    experiment: PathText
    number: Annotated[
        Annotated[Annotated[int, Ge(1), Le(15)], Tag("<one>")]
        | Annotated[Some[Annotated[int, Ge(1), Le(15)]], Tag("<list>")]
        | Annotated[Literal["all", "steps"], Tag("<text>")],
        Discriminator(lambda value: "<list>" if isinstance(value, list) else kind(value)),
    ]
    questions: Questions | None = None


class Targets(Group):
    """``conf/targets.yaml``."""

    name: Name
    page: PathText


class Figure(Group):
    """``conf/figure.yaml``."""

    name: Name
    experiment: PathText
    figure: Name


class Examples(Group):
    """``conf/examples.yaml``."""

    name: Name
    experiment: PathText
    questions: Questions


Margin = Annotated[
    Annotated[Positive, Tag("<one>")] | Annotated[Literal["control"], Tag("<text>")], Discriminator(kind)
]


class Margins(Group):
    """Of ``conf/statistics.yaml``: differences that do not matter, in points and nats."""

    score: Margin
    loss: Margin


class Question(Group):
    """Of ``conf/statistics.yaml``: methods that are compared."""

    ask: Text
    first: Annotated[
        Annotated[Some[Name], Tag("<list>")] | Annotated[Literal["all"], Tag("<text>")],
        Discriminator(lambda value: "<list>" if isinstance(value, list) else kind(value)),
    ]
    second: Some[Name]


class Statistics(Group):
    """``conf/statistics.yaml``."""

    name: Name
    experiment: PathText
    focus: Name
    baseline: Name
    seed: Seed
    samples: Count
    margin: Margins
    patience: Count
    questions: list[Question]


class Root(Group):
    """Of ``conf/fetch.yaml``."""

    root: PathText


class Fetch(Group):
    """``conf/fetch.yaml``."""

    experiment: PathText
    dry_run: bool
    verify: bool
    data: Root


class Dashboard(Group):
    """``conf/dashboard.yaml``."""

    entity: Text | None
    project: Text
    dry_run: bool
    output: PathText


class Card(Group):
    """A kind of processor in ``conf/plan.yaml``."""

    memory: Positive | None = None
    reserve: NotNegative = 0.0
    peak: dict[Literal["fp32", "bf16", "fp64"], Positive] = {}
    bandwidth: Positive | None = None
    block_seconds: NotNegative = 0.0
    graph_seconds: NotNegative = 0.0
    eigh: Positive | None = None
    match: Text | None = None
    price: NotNegative | None = None


class JudgeCosts(Group):
    """Of ``conf/plan.yaml``: tokens of a call, prices of a million of them, weights of a judge on the card."""

    prompt_tokens: Whole
    completion_tokens: Whole
    prompt_price: NotNegative | None
    completion_price: NotNegative | None
    weights: Positive


class Utilisation(Group):
    """Of ``conf/plan.yaml``: shares of a card's peaks."""

    fp32: Share
    bf16: Share
    bandwidth: Share
    fixed: Fraction


class Seconds(Group):
    """Of ``conf/plan.yaml``."""

    cell: NotNegative
    run: NotNegative
    capture: NotNegative


class Rows(Group):
    """Of ``conf/plan.yaml``: rows of a task, or blocks of dialogues."""

    train: Count
    validation: Count
    source: Text | None = None


class Typical(Group):
    """Of ``conf/plan.yaml``: score and standard deviation over seeds, in percent."""

    score: Annotated[float, Ge(0), Le(100)]
    spread: NotNegative


class TypicalLoss(Group):
    """Of ``conf/plan.yaml``: standard deviations over seeds and over rows, in nats."""

    spread: NotNegative
    rows: NotNegative


class Correlation(Group):
    """Of ``conf/plan.yaml``: of two methods."""

    seeds: Below1
    rows: Below1


class Detectable(Group):
    """Of ``conf/plan.yaml``: what least detectable differences rest on."""

    accuracy: Typical
    matthews_correlation: Typical
    pearson: Typical
    loss: TypicalLoss
    correlation: Correlation


class WhatIf(Group):
    """Of ``conf/plan.yaml``: what is planned in the place of what the experiment says."""

    protocol: Name | None
    sizes: dict[Name, Any] | None


class Plan(Group):
    """``conf/plan.yaml``."""

    experiment: PathText
    models: Some[Name] | None
    what_if: WhatIf
    results: PathText
    data_root: PathText
    json_: PathText | None = Field(alias="json")
    cards: Annotated[dict[Text, Card], Len(1)]
    utilisation: Utilisation
    seconds: Seconds
    workers: Count | None
    touched: Share
    questions: Count
    turns: Count
    currency: Text | None
    judge: JudgeCosts
    rows: dict[Name, Annotated[Annotated[Rows, Tag("<mapping>")] | Annotated[Text, Tag("<text>")], Discriminator(kind)]]
    blocks: dict[Name, Rows]
    detectable: Detectable


class TrustKills(Group):
    """Of ``conf/trust.yaml``."""

    calls: Whole
    bytes: Whole
    delays: Whole
    pairs: Whole
    both: Whole
    whole: Whole


class TrustFaults(Group):
    """Of ``conf/trust.yaml``."""

    files: Whole
    full: Whole
    options: dict[Text, list[Text]]
    surroundings: dict[Text, list[dict[Text, str | None]]]


class Trust(Group):
    """``conf/trust.yaml``; its experiment and sizes are checked where they are used."""

    output: PathText
    page: PathText | None
    work: PathText
    fresh: bool
    seed: Seed
    workers: Workers
    progress: bool
    limit: Positive
    stages: Some[Text] | None
    slow: Positive
    kills: TrustKills
    faults: TrustFaults
    experiment: dict[Name, Any]
    sizes: dict[Text, Any]
