"""PEFT's own part of the generic method: adapters on layers by name, and what one matrix with an adapter trains.

A matrix is wrapped without memory, on the meta device; on the CPU for adapters that must look at values.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from math import inf
from typing import Any, TypeVar

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.methods.costs import Operations, Shape

Found = TypeVar("Found")


def config_class(name: str) -> type[peft.PeftConfig]:
    """A configuration class of the installed PEFT that wraps layers.

    Raises:
        ValueError: if there is none of that name.
    """
    wraps = {
        found.__name__: found
        for found in vars(peft).values()
        if isinstance(found, type)
        and issubclass(found, peft.PeftConfig)
        and "target_modules" in {field.name for field in fields(found)}
    }
    if name not in wraps:
        raise ValueError(
            f"method.config={name!r}; peft {peft.__version__} wraps layers by: {', '.join(sorted(wraps))}."
        )
    return wraps[name]


def wrap(
    model: nn.Module, config: str, parts: Sequence[tuple[Mapping[str, Any], Sequence[str]]], freeze: Sequence[str] = ()
) -> Any:
    """The model with adapters on its layers, and nothing but adapters trainable.

    Args:
        model: plain.
        config: name of PEFT's configuration class.
        parts: arguments, and names of the layers that have them.
        freeze: regular expressions; adapters' parameters whose names they find are not trained.

    Raises:
        ValueError: if PEFT refuses the arguments or the layers, what it wraps can't be merged, or nothing is to freeze.
    """
    made: Any = config_class(config)
    every = [name for _, names in parts for name in names]
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    wrapped: Any = None
    for number, (arguments, names) in enumerate(parts):
        try:
            adapter: Any = made(**arguments, target_modules=list(names))
            if on_meta and config == "ShiraConfig":
                adapter.mask_fn = _first_entries
            if wrapped is None:
                wrapped = peft.get_peft_model(model, adapter)
            else:
                wrapped.add_adapter(f"part{number}", adapter)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"peft's {config} with {dict(arguments)} refuses these matrices: {text}") from None
    found = {name for name, m in wrapped.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    if found != set(every):
        raise ValueError(f"peft's {config} wraps {len(found)} of {len(every)} matrices: it is for other layers.")
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        raise ValueError(f"peft's {config} can't be merged into the weights, so it gives no plain model.")
    if len(parts) > 1:
        wrapped.base_model.set_adapter(list(wrapped.peft_config))
    own = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    for pattern in freeze:
        if not (still := [parameter for name, parameter in own.items() if re.search(pattern, name)]):
            raise ValueError(f"method.freeze has {pattern!r}, which finds no parameter of peft's {config}.")
        for parameter in still:
            parameter.requires_grad_(False)
    return wrapped


def _first_entries(layer: nn.Linear, r: int, **_: Any) -> Tensor:
    """A mask of SHiRA's size for a layer without memory, on the CPU: PEFT looks at its values."""
    o, i = layer.out_features, layer.in_features
    return (torch.arange(o * i, device="cpu") < r * (o + i)).view(o, i)


def trained_numbers(config: str, arguments: Mapping[str, Any], shape: Shape, freeze: Sequence[str] = ()) -> int:
    """Trained numbers of one wrapped matrix ``(out_features, in_features)``.

    Raises:
        ValueError: if PEFT refuses the arguments for it.
    """

    def count(device: str) -> int:
        layer = _alone(config, json.dumps(dict(arguments), sort_keys=True), shape, tuple(freeze), device)
        return sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)

    return _without_memory(count)


def operations(config: str, arguments: Mapping[str, Any], shape: Shape, freeze: Sequence[str] = ()) -> Operations:
    """See :meth:`finetune.methods.base.Method.operations`: counted for two tokens and for four.

    Raises:
        ValueError: if PEFT refuses the arguments for a matrix of this shape.
    """

    def count(device: str) -> Operations:
        layer = _alone(config, json.dumps(dict(arguments), sort_keys=True), shape, tuple(freeze), device)
        few, more = (_operations(layer, shape, tokens) for tokens in (2, 4))
        return Operations((more - few) / 2, 2 * few - more)

    return _without_memory(count)


def nearest_size(trained: Callable[[int], int], k: int, limit: int) -> int:
    """The whole number, from 1, at which ``trained`` comes nearest to k; it grows, mostly in proportion.

    Args:
        trained: of a size; ValueError where that is too large. What it says of 1 is not caught.
        limit: no size is above it.
    """

    def count(size: int) -> float:
        try:
            return trained(size)
        except ValueError:
            if size == 1:
                raise
            return inf

    low, high, counts = 0, 1, {0: 0.0, 1: count(1)}
    while counts[high] < k and high < limit:
        low, high = high, min(limit, max(2 * high, round(high * k / max(counts[high], 1))))
        counts[high] = count(high)
    while high - low > 1:
        share = (k - counts[low]) / (counts[high] - counts[low]) if counts[low] < counts[high] < inf else 0.5
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        counts[middle] = count(middle)
        low, high = (middle, high) if counts[middle] < k else (low, middle)
    return min((size for size in (low, high) if size), key=lambda size: abs(counts[size] - k))


def _without_memory(work: Callable[[str], Found]) -> Found:
    """What the work gives for a matrix on the meta device, or else on the CPU."""
    try:
        return work("meta")
    except (ValueError, NotImplementedError):
        return work("cpu")


@lru_cache(maxsize=64)
def _alone(config: str, arguments: str, shape: Shape, freeze: tuple[str, ...], device: str) -> nn.Module:
    """One wrapped matrix."""
    with torch.random.fork_rng(devices=()), torch.device(device):  # what is kept must not move what a run draws
        alone = nn.Sequential(OrderedDict(target=nn.Linear(shape[1], shape[0], bias=False))).requires_grad_(False)
        return wrap(alone, config, [(json.loads(arguments), ["target"])], freeze)


def _operations(layer: nn.Module, shape: Shape, tokens: int) -> float:
    """Operations of forward and backward pass beyond the plain product and its input's gradient."""
    device = next(layer.parameters()).device
    x = torch.empty(tokens, shape[1], device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        y.backward(torch.empty_like(y))
    return float(counter.get_total_flops() - 4 * tokens * shape[0] * shape[1])
