"""A linear layer of peft with trained cores beside it: y = base(x) + (x U_c^T) S^T V_r.

:class:`sparsegrad.truncated.TruncatedProduct` is the side path, :func:`sparsegrad.truncated.add_product_` the merge.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.linear import autocast
from sparsegrad.peft.config import SparseGradConfig
from sparsegrad.targets import is_transposed
from sparsegrad.truncated import TruncatedProduct, add_product_


class Linear(nn.Module, BaseTunerLayer):
    """A wrapped ``nn.Linear`` (a quantised one too) or transformers' ``Conv1D``.

    Args:
        base_layer: kept as it is.
        bases: of all adapters, by layer kind; held by the tuner.
        get_apply_tensor_subclass: what peft needs to quantise a merged torchao weight again.

    Attributes:
        sparsegrad_core: S ``(r, c)`` by adapter.
        kind: the layer kind by adapter.

    Raises:
        ValueError: if the base layer is something else.
    """

    in_features: int
    out_features: int
    bases: Any
    adapter_layer_names = ("sparsegrad_core",)
    other_param_names = ("kind",)

    def __init__(self, base_layer: nn.Module, bases: Any, get_apply_tensor_subclass: Any = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        own: Any = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            own, get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        quantized = self.quantization_backend is not None and self.quantization_backend.layer_type == "linear"
        self.transposed = is_transposed(own)
        if not isinstance(own, nn.Linear) and not self.transposed and not quantized:
            raise ValueError(f"it is {type(own).__name__}; nn.Linear (quantised too) and Conv1D are supported.")
        if self.transposed:
            self.in_features, self.out_features = own.weight.shape
        else:
            self.in_features, self.out_features = own.in_features, own.out_features
        vars(self)["bases"] = bases  # unregistered: a state dictionary holds them once, at the tuner
        self.sparsegrad_core = nn.ParameterDict()
        self.kind: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, kind: str, ranks: tuple[int, int], config: SparseGradConfig) -> None:
        """Add an adapter: S is zero, so that the function does not change."""
        core = torch.zeros(*ranks)
        self.sparsegrad_core[adapter] = nn.Parameter(core if config.init_weights else core.normal_(std=0.1))
        self.kind[adapter] = kind
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def basis(self, adapter: str) -> Basis:
        """The basis that an adapter of this layer moves in.

        Raises:
            ValueError: if it is still to be loaded.
        """
        kind = self.kind[adapter]
        if adapter not in self.bases or kind not in self.bases[adapter]:
            raise ValueError(
                f"adapter {adapter!r} has no basis of kind {kind!r} yet: its configuration is a saved adapter's, whose "
                "file holds the bases. Load it with PeftModel.from_pretrained, or give config.bases."
            )
        return self.bases[adapter][kind]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in_features) -> (..., out_features)``, in the base layer's output dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for adapter in self.active_adapters:
            if adapter in self.sparsegrad_core:
                core, basis = self.sparsegrad_core[adapter], self.basis(adapter)
                U, V = basis.U.to(x.device), basis.V.to(x.device)  # layers of a kind may lie on several devices
                y = y + TruncatedProduct.apply(autocast(x), None, None, core, U, V, True).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters to the base weight.

        Args:
            safe_merge: whether to leave the weight as it is where the sum is not finite.
            adapter_names: which adapters; None takes the active ones.

        Raises:
            ValueError: if a sum is not finite, with ``safe_merge``.
        """
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter in self.sparsegrad_core:
                weight = self._moved(adapter, 1)
                if safe_merge and not torch.isfinite(weight).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: the base "
                        "weight is unchanged."
                    )
                self.set_base_weight(weight)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.sparsegrad_core:
                self.set_base_weight(self._moved(adapter, -1))

    @torch.no_grad()
    def _moved(self, adapter: str, sign: int) -> Tensor:
        """The base weight with an adapter added or taken away, as the layer stores it."""
        stored = self.get_base_weight()
        core, basis = self.sparsegrad_core[adapter].to(stored.device), self.basis(adapter)
        U, V = basis.U.to(stored.device), basis.V.to(stored.device)
        own = stored.to(torch.promote_types(stored.dtype, torch.promote_types(core.dtype, torch.float32)), copy=True)
        weight = own.T.contiguous() if self.transposed else own
        add_product_(weight, V, core if sign > 0 else -core, U)
        return (weight.T.contiguous() if self.transposed else weight).to(stored.dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """V_r^T S U_c, as the base layer stores its weight; in the core's dtype."""
        core, basis = self.sparsegrad_core[adapter], self.basis(adapter)
        zero = core.new_zeros(self.out_features, self.in_features)
        delta = add_product_(zero, basis.V.to(core.device), core, basis.U.to(core.device))
        return delta.T.contiguous() if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Weights are base plus :meth:`get_delta_weight`."""
        return True

    def __repr__(self) -> str:
        return f"sparsegrad.{super().__repr__()}"
