"""Which methods are compared with which: families of pairs, from the catalogue and the experiment's file.

The experiment's own methods with each other; each of them with every control; every ablation with the method that it is
a form of, and with the one that it extends. Each family has its own Holm correction.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from finetune.report.labels import Labels

METHODS, CONTROL, VARIANTS = "methods", "methods over", "variants of"
"""Kinds of families; the last two are of one method."""


@dataclass(frozen=True)
class Question:
    """A question about methods, of `conf/statistics.yaml`: does one of the first beat one of the second?

    Attributes:
        first: Names of methods, or `all`: every one that ran and is not among the second.
    """

    ask: str
    first: tuple[str, ...] | str
    second: tuple[str, ...]

    def pairs(self, ran: Sequence[str]) -> list[tuple[str, str]]:
        """The pairs of methods that both ran."""
        first = [name for name in ran if name not in self.second] if self.first == "all" else self.first
        return [(one, other) for one in first for other in self.second if one in ran and other in ran]


@dataclass(frozen=True)
class Design:
    """What is compared, and how.

    Attributes:
        labels: Facts of every method that may have run, and the order of tasks.
        peers: The experiment's own methods.
        focus: The method that is the first of all its pairs with peers.
        baseline: The method that is the second of all of its own.
        seed: Seed of bootstraps and of sampled sign patterns.
        samples: Number of bootstrap resamples; ten times as many sign patterns.
        margin: `score` in points and `loss` in nats: the largest difference that does not matter. `control`: standard
            deviation of the control's scores over seeds.
        patience: Evaluations without a better score after which a run would have stopped.
    """

    labels: Labels
    peers: tuple[str, ...]
    focus: str = "sparsegrad"
    baseline: str = "full"
    seed: int = 0
    samples: int = 10_000
    margin: Mapping[str, float | str] = field(default_factory=lambda: {"score": 1.0, "loss": 0.01})
    patience: int = 3
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Family:
    """Pairs that are corrected together.

    Attributes:
        name: Such as `methods` or `variants of sparsegrad`.
        kind: `METHODS`, `CONTROL` or `VARIANTS`.
        of: The control, or the method that the pairs' first ones are variants of; empty for `METHODS`.
        left_out: Pairs without a task and seed in common.
    """

    name: str
    kind: str
    of: str
    pairs: tuple[Any, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def families_of(names: Iterable[str], design: Design) -> list[Family]:
    """Say which of the methods that ran are compared with which, as (first, second); no family is without a pair.

    Raises:
        ValueError: If a method has no facts.
    """
    ran, facts = list(names), design.labels.methods
    unknown = [name for name in ran if name not in facts]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; known are {', '.join(facts)}: each needs its file in conf/method")
    controls = [name for name in ran if facts[name].control]
    peers = [name for name in design.peers if name in ran and name not in controls]
    peers.sort(key=lambda name: (name != design.focus, name == design.baseline))
    variants = sorted(name for name in ran if name not in peers and name not in controls)
    found = [(METHODS, "", [*combinations(peers, 2)])]
    found += [(CONTROL, control, [(name, control) for name in peers]) for control in controls]
    for of in (*peers, *variants):
        kin = [name for name in variants if name != of and of in (facts[name].base, facts[name].extends)]
        found.append((VARIANTS, of, [(name, of) for name in kin]))
    families = [Family(f"{kind} {of}".strip(), kind, of, tuple(pairs)) for kind, of, pairs in found]
    return [family for family in families if family.pairs]
