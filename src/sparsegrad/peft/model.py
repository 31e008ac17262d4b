"""The tuner: puts :class:`sparsegrad.peft.layer.Linear` in place of the targets and holds the bases that they share."""

# pyright: reportIncompatibleMethodOverride=false, reportPrivateUsage=false
# peft's tuners narrow the hooks of BaseTuner in the same way, underscores are theirs.

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from sparsegrad.basis import Basis, own_rows, random_basis
from sparsegrad.convert import basis_of
from sparsegrad.fingerprint import fingerprint
from sparsegrad.io import load_bases
from sparsegrad.linear import fitting_basis
from sparsegrad.peft.config import SparseGradConfig
from sparsegrad.peft.layer import Linear
from sparsegrad.targets import ALL_MLP, resolve_targets

BASES = "sparsegrad_bases"


class SparseGradModel(BaseTuner):
    """A model whose targets have cores beside them.

    Attributes:
        sparsegrad_bases: by adapter and layer kind, the leading rows that its cores need; in float32 at least.
    """

    uses_shared_state = True
    prefix = "sparsegrad_"
    tuner_layer_cls = Linear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as in peft

    def _pre_injection_hook(self, model: nn.Module, config: SparseGradConfig, adapter_name: str) -> None:
        self.sparsegrad_bases = nn.ModuleDict()

    def _prepare_adapter_config(self, peft_config: SparseGradConfig, model_config: dict[str, Any]) -> SparseGradConfig:
        if peft_config.target_modules in (None, ALL_MLP):
            peft_config.take_kinds(resolve_targets(self.model, ALL_MLP))
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: SparseGradConfig, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(peft_config, key)
        return found and peft_config.takes_block(key)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft; what an adapter that could not be made left of its bases is dropped."""
        config = cast(SparseGradConfig, self.peft_config[adapter_name])
        self._given = load_bases(config.bases)[0] if isinstance(config.bases, str) else config.bases
        self.sparsegrad_bases[adapter_name] = nn.ModuleDict()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            del self.sparsegrad_bases[adapter_name]
            raise
        finally:
            self._given = None

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, its bases too."""
        super().delete_adapter(adapter_name)
        del self.sparsegrad_bases[adapter_name]

    def _create_and_replace(
        self,
        peft_config: SparseGradConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        known = isinstance(target, Linear)
        try:
            if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
                raise ValueError(f"{type(parent).__name__} reads its weight past its forward: leave it out.")
            layer = target if known else Linear(target, self.sparsegrad_bases, **get_quantization_kwargs(self))
            kind = peft_config.kind(current_key)
            ranks = self._ranks(peft_config, adapter_name, kind, layer)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from None
        layer.update_layer(adapter_name, kind, ranks, peft_config)
        if not known:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _ranks(self, config: SparseGradConfig, adapter: str, kind: str, layer: Linear) -> tuple[int, int]:
        """Of a layer's core; the basis is made with the first layer of its kind.

        Raises:
            ValueError: if there is no basis, or one of another shape.
        """
        bases = cast(nn.ModuleDict, self.sparsegrad_bases[adapter])
        shape = layer.out_features, layer.in_features
        if kind not in bases:
            if self._given is None and config.init_bases == "given":
                if config.save_bases and kind in config.cores:
                    return config.cores[kind][0], config.cores[kind][1]  # the adapter's file brings the basis
                raise ValueError(
                    "no bases: give bases, a file of sparsegrad.save_bases or a mapping, or init_bases='random', which "
                    "draws them as a control."
                )
            source = basis_of(self._given, kind) if self._given is not None else _whole(shape)
            fitting_basis(source, shape, source.U.device)
            r, c = config.core(kind, source)
            rows = _drawn(config.seed, kind, shape, (r, c)) if self._given is None else source
            bases[kind] = own = own_rows(rows, layer.weight, (r, c))
            config.cores[kind] = [r, c]
            if not config.save_bases:
                _refer(config, kind, own)
        basis = cast(Basis, bases[kind])
        if (basis.out_features, basis.in_features) != shape:
            raise ValueError(
                f"it has shape {shape}, another matrix of kind {kind!r} has {(basis.out_features, basis.in_features)}: "
                "give target_modules as a dictionary of layer kind to regular expression."
            )
        return basis.ranks

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Generator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: SparseGrad takes no batches of several adapters; use set_adapter.")
        yield

    # ---- files ----

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f"{BASES}.{adapter_name}." in key:
            return key.replace(f"{BASES}.{adapter_name}.", f"{BASES}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SparseGradConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        for layer in _layers(model, adapter_name):
            layer.basis(adapter_name)  # an error where it is still to be loaded
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseGradConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if config.save_bases:
            tuner = next(module for module in model.modules() if isinstance(module, cls))
            held = cast(nn.ModuleDict, tuner.sparsegrad_bases[adapter_name])
            held.update(_bases_in(state_dict, adapter_name, _layers(model, adapter_name)))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _bases_in(tensors: Mapping[str, Tensor], adapter: str, layers: list[Linear]) -> dict[str, Basis]:
    """Of each layer kind, from an adapter's file.

    Raises:
        ValueError: if the file has none, or one that does not fit a layer.
    """
    found: dict[str, Basis] = {}
    for layer in layers:
        kind, core = layer.kind[adapter], layer.sparsegrad_core[adapter]
        try:
            if kind not in found:
                rows = Basis(*(tensors[f"base_model.{BASES}.{kind}.{letter}"] for letter in "UV"))
                found[kind] = own_rows(rows, layer.weight, rows.ranks)
            fitting_basis(found[kind], (layer.out_features, layer.in_features), layer.weight.device)
            if found[kind].ranks != tuple(core.shape):
                raise ValueError(f"it has ranks {found[kind].ranks}, the core {tuple(core.shape)}")
        except (KeyError, ValueError) as error:
            raise ValueError(f"the adapter's file has no basis of kind {kind!r} that fits: {error}.") from None
    return found


def _layers(model: nn.Module, adapter: str) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear) and adapter in module.kind]


def _whole(shape: tuple[int, int]) -> Basis:
    """A full basis without values: what sizes are allowed."""
    out_features, in_features = shape
    return Basis(*(torch.empty(n, n, device="meta") for n in (in_features, out_features)))


def _drawn(seed: int, kind: str, shape: tuple[int, int], ranks: tuple[int, int]) -> Basis:
    """Random orthonormal rows, the same for a seed and kind, whatever else is adapted."""
    own = int.from_bytes(hashlib.sha256(f"{seed} {kind}".encode()).digest()[:7])
    factors = (torch.zeros(rows, n, dtype=torch.float64) for rows, n in zip(ranks[::-1], shape[::-1], strict=True))
    return random_basis(Basis(*factors), torch.Generator().manual_seed(own))


def _refer(config: SparseGradConfig, kind: str, basis: Basis) -> None:
    """Leave a basis out of the adapter's file, which holds its fingerprint.

    Raises:
        ValueError: if it is not the one that the adapter was trained in.
    """
    found = " ".join(fingerprint(factor.float()) for factor in (basis.U, basis.V))
    if config.fingerprints.setdefault(kind, found) != found:
        raise ValueError(
            f"the basis of kind {kind!r} is not the one that this adapter was trained in: give that one, or for a new "
            "adapter a new configuration."
        )
    for letter in "UV":  # no state dictionary misses it
        basis.register_buffer(letter, getattr(basis, letter), persistent=False)
