"""One of several adapters of a model: its configuration and what it holds, in memory and in a directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sparsegrad.adapter import AdapterState, put_adapter, read_adapter
from sparsegrad.basis import Basis
from sparsegrad.config import SparseGradConfig
from sparsegrad.convert import sparsify
from sparsegrad.io import load_bases, save_bases, save_tensors
from sparsegrad.swap import Swap

ADAPTER_FILE, BASES_FILE = "adapter_model.safetensors", "bases.safetensors"

Bases = Mapping[str, Basis] | str | Path | None


@dataclass
class NamedAdapter:
    """What a name stands for.

    Attributes:
        config: complete for its model.
        state: what it holds while it waits, bases too; of the active one what was put in; None of a new one.
    """

    config: SparseGradConfig
    state: AdapterState | None = None

    @classmethod
    def new(cls, config: SparseGradConfig, model: nn.Module) -> NamedAdapter:
        """One that changes nothing yet, for a plain model.

        Raises:
            ValueError: if the configuration is none of this library's, or as
                :meth:`sparsegrad.SparseGradConfig.completed`.
        """
        if not isinstance(config, SparseGradConfig):
            raise ValueError(
                f"config is a {type(config).__module__}.{type(config).__name__}; give a sparsegrad.SparseGradConfig."
            )
        return cls(config.completed(model))

    @classmethod
    def read(cls, directory: str | Path, bases: Bases) -> tuple[NamedAdapter, Bases]:
        """What :meth:`write` wrote, and the bases that it refers to: those given, or the directory's."""
        directory = Path(directory)
        adapter = cls(SparseGradConfig.from_pretrained(directory), read_adapter(directory / ADAPTER_FILE))
        own = directory / BASES_FILE
        return adapter, own if bases is None and own.exists() else bases

    def write(self, directory: Path, bases: str) -> None:
        """Write the three files; with bases by ``reference``, the first two."""
        assert self.state is not None  # of a new one it is taken from the model first
        tensors, metadata = self.state.tensors, self.state.metadata
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("basis.")}
        found = {kind: Basis(*(tensors[f"basis.{kind}.{factor}"] for factor in "UV")) for kind in metadata["bases"]}
        save_tensors(directory / ADAPTER_FILE, own, metadata)
        if bases == "inside" and found:
            save_bases(directory / BASES_FILE, found)
        else:
            (directory / BASES_FILE).unlink(missing_ok=True)
        self.config.save_pretrained(directory)

    def put_in(self, model: nn.Module, bases: Bases = None, *, keep_base: bool | None = None) -> Swap:
        """Put the adapter in a base model; its state holds its bases from now on.

        Raises:
            ValueError: as :func:`sparsegrad.sparsify` or :func:`sparsegrad.put_adapter`, or if the configuration is not
                the state's; the model is as it was then.
        """
        given = load_bases(bases)[0] if isinstance(bases, str | Path) else bases
        state, config = self.state, self.config
        if state is not None:
            self._refuse_other_config(state, model)
            self.refuse_others(state, model)

        def convert(model: nn.Module) -> nn.Module:
            if state is None:
                return sparsify(model, given, **config.arguments(model))
            return put_adapter(model, state, given)

        keep = config.keep_base if keep_base is None else keep_base
        swap = Swap(model, convert, config.saved_names(model), keep)
        if state is not None:
            held = {layer.kind: layer.basis for layer in swap.layers() if layer.basis is not None}
            own = {f"basis.{kind}.{name}": getattr(basis, name).cpu() for kind, basis in held.items() for name in "UV"}
            self.state = AdapterState({**state.tensors, **own}, state.metadata)
        return swap

    def refuse_others(self, state: AdapterState, model: nn.Module) -> None:
        """Raise ValueError for values of what is neither a target nor in ``modules_to_save``."""
        own = self.config.saved_names(model) | {f"{name}.bias" for name in state.metadata["shapes"]}
        dense = {name.removeprefix("dense.") for name in state.tensors if name.startswith("dense.")}
        if others := sorted(dense - own):
            raise ValueError(
                f"{', '.join(others[:4])}{' ...' if others[4:] else ''} differ from the base model, and "
                "modules_to_save does not name them, so no other adapter could have them back: name their modules."
            )

    def _refuse_other_config(self, state: AdapterState, model: nn.Module) -> None:
        """Raise ValueError unless the state was made with what the configuration says."""
        made = state.metadata["arguments"]
        for name, value in json.loads(json.dumps(self.config.arguments(model))).items():
            if value is not None and made.get(name) != value:
                raise ValueError(
                    f"the configuration has {name}={value!r}, the adapter was made with {made.get(name)!r}: give the "
                    "files of one adapter."
                )


def check_name(name: object) -> None:
    """Raise ValueError for what is no name of a folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"adapter_name={name!r}; allowed: letters, digits, _, - and, but first, a full stop.")
