"""What an adapter of peft is made with; its JSON form is peft's ``adapter_config.json``."""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import PeftConfig

from sparsegrad.basis import Basis
from sparsegrad.convert import kind_value
from sparsegrad.core import checked_ranks
from sparsegrad.select import entries_for_density
from sparsegrad.targets import ALL_MLP, kind_of

INIT_BASES = ("given", "random")


class SparseGradType(str, enum.Enum):  # noqa: UP042 - peft prints what stands after the full stop of str()
    """The method's name in peft's mappings: equal to the word in a configuration file, as members of PeftType are."""

    SPARSEGRAD = "SPARSEGRAD"


@dataclass
class SparseGradConfig(PeftConfig):
    """Configuration of SparseGrad's truncated form in peft.

    One of ``k``, ``ranks`` and ``density`` sizes the trained core S ``(r, c)`` of each matrix; k and ranks may be given
    by layer kind. The kind of a matrix is what follows its block's number in its name, dots as underscores
    (``mlp_up_proj``), or a key of ``target_modules`` where that is a dictionary. Matrices of a kind share one basis, so
    they have one shape.

    Args:
        target_modules: a list of names or suffixes, or a regular expression, as in all of peft; "all-linear"; a
            dictionary of layer kind to regular expression, or "all-mlp", as :func:`sparsegrad.sparsify` takes them.
            None takes "all-mlp".
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in all of peft; of a dictionary's
            patterns, the group ``layer`` is the block.
        k: budget of entries of a core.
        ranks: ``(r, c)``.
        density: k as a share of a matrix' entries; the default is 0.01.
        bases: path of a file of :func:`sparsegrad.save_bases`, or the bases themselves by layer kind.
        init_bases: ``given`` or ``random``: orthonormal rows drawn by ``seed``, a control.
        save_bases: whether the adapter's file holds the bases. Without them it is smaller, and loading needs ``bases``.
        init_weights: False draws S at random instead of zeros; for tests.
        kinds, cores, fingerprints: found as the adapter is made: the patterns of a dictionary, ``(r, c)`` and
            (without ``save_bases``) the basis' fingerprint of each kind.

    Raises:
        ValueError: if the options contradict each other.
    """

    target_modules: list[str] | set[str] | str | dict[str, str] | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    k: int | dict[str, int] | None = field(default=None)
    ranks: list[int] | tuple[int, int] | dict[str, Any] | None = field(default=None)
    density: float | None = field(default=None)
    bases: str | Mapping[str, Basis] | None = field(default=None, repr=False)
    init_bases: str = field(default="given")
    seed: int = field(default=0)
    save_bases: bool = field(default=True)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    init_weights: bool = field(default=True)
    kinds: dict[str, str] | None = field(default=None)
    cores: dict[str, list[int]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SparseGradType.SPARSEGRAD
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        sizes = {name: getattr(self, name) for name in ("k", "ranks", "density")}
        if len(given := [f"{name}={value}" for name, value in sizes.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of k, ranks and density.")
        if self.init_bases not in INIT_BASES:
            raise ValueError(f"init_bases={self.init_bases!r}; allowed: {', '.join(INIT_BASES)}.")
        if self.init_bases == "random" and self.bases is not None:
            raise ValueError("init_bases='random' draws the bases: leave bases out, or init_bases.")
        if isinstance(self.target_modules, Mapping):
            self.take_kinds(self.target_modules)
        expression = isinstance(self.target_modules, str) and self.target_modules != ALL_MLP and self.kinds is None
        if expression and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform cannot be used when target_modules is a str: its blocks are named there."
            )
        if self.layers_pattern and (self.layers_to_transform is None or isinstance(self.target_modules, str)):
            raise ValueError("layers_pattern goes with layers_to_transform and a list of target_modules.")

    def take_kinds(self, patterns: Mapping[str, str]) -> None:
        """Target what a dictionary of layer kind to regular expression names; its groups name the blocks."""
        if self.layers_pattern:
            raise ValueError("layers_pattern goes with a list of target_modules: name the blocks in the patterns.")
        self.kinds = dict(patterns)
        # One expression, as peft knows it; its groups would be named twice.
        self.target_modules = "|".join(f"(?:{re.sub(r'[(][?]P<[^>]*>', '(', p)})" for p in patterns.values())

    def takes_block(self, name: str) -> bool:
        """Whether ``layers_to_transform`` has the block that a pattern of a dictionary finds in a module's name."""
        if self.kinds is None or self.layers_to_transform is None:
            return True  # for a list, peft looks
        blocks = self.layers_to_transform
        found = next(filter(None, (re.fullmatch(pattern, name) for pattern in self.kinds.values())))
        return int(found.groupdict().get("layer") or -1) in ([blocks] if isinstance(blocks, int) else blocks)

    def kind(self, name: str) -> str:
        """The layer kind of a matrix by its module's name."""
        if self.kinds is not None:
            return next(kind for kind, pattern in self.kinds.items() if re.fullmatch(pattern, name))
        return kind_of(name)

    def core(self, kind: str, basis: Basis) -> tuple[int, int]:
        """r and c in a basis.

        Raises:
            ValueError: if it has fewer rows, or there is none for this kind.
        """
        shape = (basis.out_features, basis.in_features)
        if kind in self.cores:
            r, c = self.cores[kind]
            return checked_ranks(r * c, (r, c), basis)
        if self.ranks is not None:
            r, c = kind_value(self.ranks, kind, "ranks")
            return checked_ranks(r * c, (r, c), basis)
        k = entries_for_density(self.density or 0.01, shape) if self.k is None else kind_value(self.k, kind, "k")
        return checked_ranks(k, None, basis)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without the bases, which the adapter's file holds, or which are given by their path."""
        plain = copy.copy(self)
        plain.bases = self.bases if isinstance(self.bases, str) and not self.save_bases else None
        return asdict(plain)
