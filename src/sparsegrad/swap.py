"""Where a model and an adapted one differ, and what stands there: the base's modules, the adapter's, or merged ones.

Objects are exchanged, nothing is computed and no value is written: the base that comes back is the base, to the bit,
and an adapter's layers that come back are those that an optimizer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sparsegrad.convert import merge, sparsegrad_layers
from sparsegrad.linear import SparseGradLinear, SparseGradWeight

State = Literal["base", "adapted", "merged"]


class Swap:
    """The places of a model that a conversion changes.

    Args:
        model: plain; adapted afterwards.
        convert: changes modules and parameters of the model in place; called once.
        own: names of parameters and buffers that the adapter has a copy of, so that it may write to them.
        keep_base: keep on the CPU what stood there; else only what the adapter's layers share memory with.

    Attributes:
        state: what stands there now.

    Raises:
        ValueError: as ``convert``; the model is as it was then.
    """

    def __init__(
        self, model: nn.Module, convert: Callable[[nn.Module], object], own: Container[str], keep_base: bool
    ) -> None:
        self.model = model
        self.state: State = "adapted"
        before = list(_held(model))
        try:
            _copy_own(model, own)
            convert(model)
        except BaseException:
            for owner, name, value in before:
                if _get(owner, name) is not value:
                    _put(owner, name, value)
            raise
        changed = [(owner, name, value) for owner, name, value in before if _get(owner, name) is not value]
        self._places = [(owner, name) for owner, name, _ in changed]
        self._absent: dict[str, list[Any]] = {"base": [value for _, _, value in changed]}
        for value in self._absent["base"]:
            _freeze(value)
        self._put_aside_base(keep=keep_base)

    @torch.inference_mode(False)  # what is moved or merged may be trained later
    def show(self, state: State, why: str) -> None:
        """Put what belongs to a state in its places.

        Raises:
            ValueError: if the base was not kept; ``why`` says what it is needed for, and nothing has changed.
        """
        if state == self.state:
            return
        if state == "base" and any(value is None for value in self._absent.get("base", ())):
            raise ValueError(
                f"{why} needs the weights of the base model, which were not kept (keep_base=False): load it again."
            )
        now = [_get(owner, name) for owner, name in self._places]
        if state == "merged":
            self.show("adapted", why)
            adapted = self._absent["adapted"] = [_get(owner, name) for owner, name in self._places]
            merge(self.model)
            for (owner, name), layer in zip(self._places, adapted, strict=True):
                if (merged := _get(owner, name)) is not layer:
                    _freeze(merged)
        else:
            for (owner, name), value, present in zip(self._places, self._absent.pop(state), now, strict=True):
                _put(owner, name, _like(value, present))
            if self.state != "merged":
                self._absent[self.state] = now
        self.state = state
        if "base" in self._absent:
            self._put_aside_base(keep=True)
        for layer in self.layers():
            cast(SparseGradWeight, layer.trained).away = state != "adapted"

    @contextmanager
    def showing(self, state: State, why: str) -> Generator[None]:
        """:meth:`show`, and back."""
        before = self.state
        self.show(state, why)
        try:
            yield
        finally:
            self.show(before, why)

    def layers(self) -> list[SparseGradLinear]:
        """Of the adapter, whether they stand in the model or not."""
        if self.state == "adapted":
            return list(sparsegrad_layers(self.model).values())
        held = [value for value in self._absent["adapted"] if isinstance(value, nn.Module)]
        return [layer for value in held for layer in sparsegrad_layers(value).values()]

    def _put_aside_base(self, *, keep: bool) -> None:
        """To the CPU, but for what an adapter's layer shares; or drop it."""
        base = self._absent["base"]
        for number, ((owner, name), value) in enumerate(zip(self._places, base, strict=True)):
            present = _get(owner, name)
            if _memory(value) & _memory(present):
                continue
            if not keep and _layer_in(present) is not None:
                base[number] = None
            elif isinstance(value, Tensor):
                value.data = value.data.cpu()
            elif isinstance(value, nn.Module):
                value.cpu()


def _held(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and value of every module, parameter and buffer, and how a configuration computes experts."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        for table in _tables(module).values():
            yield from ((module, name, value) for name, value in table.items() if value is not None)
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            configs[id(config)] = config
    yield from ((config, "_experts_implementation", config._experts_implementation) for config in configs.values())


def _get(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, nn.Module):
        own = next(table for kind, table in _tables(owner).items() if isinstance(value, kind))
        if name in own:
            own[name] = value  # in the order that it had
            return
        delattr(owner, name)
    setattr(owner, name, value)


def _tables(module: Any) -> dict[type, dict[str, Any]]:
    """What a module holds, by the type of what is held; parameters before the tensors that they are."""
    return {nn.Module: module._modules, nn.Parameter: module._parameters, Tensor: module._buffers}


def _freeze(value: Any) -> None:
    if isinstance(value, nn.Module | nn.Parameter):
        value.requires_grad_(False)


def _copy_own(model: nn.Module, own: Container[str]) -> None:
    """Give names copies of their tensors; tied ones stay tied."""
    copies: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        tables = _tables(module)
        for table in (tables[nn.Parameter], tables[Tensor]):
            for name, value in table.items():
                if value is None or f"{prefix}.{name}".removeprefix(".") not in own:
                    continue
                copy = copies.get(id(value))
                if copy is None:
                    copy = value.detach().clone()
                    copy = nn.Parameter(copy, requires_grad=False) if isinstance(value, nn.Parameter) else copy
                    copies[id(value)] = copies[id(copy)] = copy
                table[name] = copy


def _layer_in(value: Any) -> SparseGradLinear | None:
    modules = value.modules() if isinstance(value, nn.Module) else ()
    return next((module for module in modules if isinstance(module, SparseGradLinear)), None)


def _memory(value: Any) -> set[int]:
    """Addresses of the storages of a value's tensors."""
    tensors = value.parameters() if isinstance(value, nn.Module) else [value] if isinstance(value, Tensor) else []
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta} - {0}


def _like(value: Any, present: Any) -> Any:
    """A value on the device and in the precision of what stands in its place, in place; a model may have moved."""
    if _memory(value) & _memory(present):
        return value
    layer, other = _layer_in(present), _layer_in(value)
    if layer is not None:
        device, dtype = layer.trained.device, layer.plain_dtype
    else:
        tensor = next(present.parameters()) if isinstance(present, nn.Module) else present
        if not isinstance(tensor, Tensor):
            return value
        device, dtype = tensor.device, tensor.dtype
    if other is not None and (other.trained.device, other.plain_dtype) == (device, dtype):
        return value
    if isinstance(value, nn.Module):
        return value.to(device, dtype if dtype.is_floating_point else None)
    if (value.device, value.dtype) != (device, dtype):
        value.data = value.data.to(device, dtype)
    return value
