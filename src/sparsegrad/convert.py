"""From a plain model to SparseGrad layers and back.

Works on any model whose MLPs are ``nn.Linear``. ``target_modules`` maps a layer kind (``up``, ``down``, ``gate``) to a
regular expression that the *whole* module name must match; its group ``layer`` is the block's index. Suffixes, as PEFT
matches lists, would take BERT's ``attention.output.dense`` for ``output.dense``: 36 matrices instead of 24.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.folded import FoldedLinear
from sparsegrad.linear import SparseGradLinear
from sparsegrad.quantized import QuantizedTruncatedLinear, is_quantized
from sparsegrad.rotated import RotatedLinear
from sparsegrad.truncated import TruncatedLinear, checked_ranks

FORMS = {"folded": FoldedLinear, "rotated": RotatedLinear, "truncated": TruncatedLinear}


@dataclass(frozen=True)
class Target:
    """One module to replace: its kind, its block's index (None without a group ``layer``), its full name."""

    kind: str
    layer: int | None
    name: str
    module: nn.Module


def find_targets(
    model: nn.Module, target_modules: Mapping[str, str], layers_to_transform: Sequence[int] | None = None
) -> list[Target]:
    """The linear layers that the patterns name, in model order.

    Args:
        model: any module.
        target_modules: layer kind to regular expression.
        layers_to_transform: block indices to take; None takes all.

    Raises:
        ValueError: if a pattern matches nothing, matches something that is no linear layer, a block is missing, or the
            blocks leave a layer kind without any layer.
    """
    found = list(_matches(model, target_modules))
    for kind, pattern in target_modules.items():
        if not any(target.kind == kind for target in found):
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ValueError(
                f"target_modules.{kind}={pattern!r} matches no module in full. Linear layers of this model: "
                f"{', '.join(linear[:8])}{' ...' if len(linear) > 8 else ''}."
            )
    wrong = [t for t in found if not isinstance(t.module, nn.Linear | SparseGradLinear)]
    if wrong:
        kinds = ", ".join(f"{t.name} ({type(t.module).__name__})" for t in wrong[:4])
        raise ValueError(f"target_modules must name nn.Linear layers; these are not: {kinds}.")
    if layers_to_transform is None:
        return found
    missing = sorted(set(layers_to_transform) - {t.layer for t in found})
    if missing:
        present = sorted({t.layer for t in found if t.layer is not None})
        raise ValueError(f"layers_to_transform names blocks {missing}; the model has {present or 'no block index'}.")
    kept = [t for t in found if t.layer in set(layers_to_transform)]
    left_out = [kind for kind in target_modules if not any(t.kind == kind for t in kept)]
    if left_out:
        raise ValueError(
            f"layers_to_transform={list(layers_to_transform)} leaves no layer of kind {', '.join(left_out)}: name "
            "blocks of that kind, with the group 'layer' in its pattern, or leave the kind out of target_modules."
        )
    return kept


def sparsify(
    model: nn.Module,
    bases: Mapping[str, Basis] | None,
    k: int | Mapping[str, int],
    target_modules: Mapping[str, str],
    layers_to_transform: Sequence[int] | None = None,
    *,
    form: str = "folded",
    matmul: str = "regular",
    select_in: str = "step",
    ranks: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    keep: int | Mapping[str, int] | None = None,
    update: str | None = None,
) -> nn.Module:
    """Replace the target layers in place; the function of the model does not change.

    Args:
        model: a plain model.
        bases: one for each layer kind, shared by all blocks; None for no rotation (MeProp's space).
        k: entries kept in each matrix, one number or one a kind; for the truncated form, entries of the core.
        target_modules, layers_to_transform: see :func:`find_targets`.
        form: ``folded`` (default), ``rotated`` or ``truncated``.
        matmul: ``regular`` or ``sparse_by_dense``; for the rotated form.
        select_in: ``step`` or ``backward``; see :mod:`sparsegrad.linear`. Not for the truncated form.
        ranks, keep, update: for the truncated form, see :class:`sparsegrad.TruncatedLinear`; ranks ``(r, c)`` and keep
            for all kinds, or one a kind.

    Returns:
        The same model.

    Raises:
        ValueError: on an unmatched target, a basis missing or of other shapes, k out of range, or an unknown option.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}; allowed: {', '.join(FORMS)}.")
    if form != "rotated" and matmul != "regular":
        raise ValueError(f"matmul={matmul!r} belongs to form='rotated'; form={form!r} has no rotated product.")
    own = {"ranks": ranks, "keep": keep, "update": update}
    if form != "truncated" and any(value is not None for value in own.values()):
        given = ", ".join(f"{name}={value!r}" for name, value in own.items() if value is not None)
        raise ValueError(f"{given} belong to form='truncated'; form={form!r} selects among all entries.")
    if form == "truncated" and select_in != "step":
        raise ValueError(f"select_in={select_in!r}; form='truncated' has no dense gradient to avoid: leave it 'step'.")
    targets = find_targets(model, target_modules, layers_to_transform)
    if any(isinstance(t.module, SparseGradLinear) for t in targets):
        raise ValueError("the model holds SparseGrad layers already: merge(model) first.")
    leading = form == "truncated"
    shared = _shared_bases(targets, bases, (k, ranks) if leading else None)
    options = {"select_in": select_in} | ({"matmul": matmul} if form == "rotated" else {})
    built = []
    for target in targets:  # build all before replacing any: an error leaves the model as it was
        linear, kind = target.module, target.kind
        basis = shared.get(kind)
        if leading:
            rows = None if basis is None else basis.ranks
            options = {"ranks": rows, "keep": _of_kind(keep, kind, "keep"), "update": update}
        quantized = is_quantized(linear)
        if quantized and not leading:
            raise ValueError(f"{target.name} is quantised ({type(linear).__name__}): use form='truncated'.")
        source = (linear,) if quantized else (linear.weight, linear.bias)
        layer_class = QuantizedTruncatedLinear if quantized else FORMS[form]
        try:
            layer = layer_class(*source, basis, _of_kind(k, kind, "k"), **options)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
        layer.kind = kind
        layer.trained.requires_grad_(quantized or linear.weight.requires_grad)
        built.append((target.name, layer.train(linear.training)))
    for name, layer in built:
        model.set_submodule(name, layer)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Replace every SparseGrad layer by the ``nn.Linear`` of the same function, in place.

    Returns:
        The same model, plain again: ``save_pretrained`` and FastChat take it.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseGradLinear):
            model.set_submodule(name, module.to_linear().train(module.training))
    return model


def sparsegrad_layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    """SparseGrad layers by full module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseGradLinear)}


def _matches(model: nn.Module, target_modules: Mapping[str, str]) -> Iterator[Target]:
    compiled = {}
    for kind, pattern in target_modules.items():
        try:
            compiled[kind] = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"target_modules.{kind}={pattern!r} is no regular expression: {error}.") from None
    for name, module in model.named_modules():
        for kind, pattern in compiled.items():
            match = pattern.fullmatch(name)
            if match:
                index = match.groupdict().get("layer")
                yield Target(kind, None if index is None else int(index), name, module)
                break


def _of_kind(value: Any, kind: str, name: str) -> Any:
    """An option of one layer kind: it may be given for all kinds at once."""
    if not isinstance(value, Mapping):
        return value
    if kind not in value:
        raise ValueError(f"no {name} for layer kind {kind!r}; given: {', '.join(value) or 'none'}.")
    return value[kind]


def _shared_bases(
    targets: Sequence[Target], bases: Mapping[str, Basis] | None, core: tuple[Any, Any] | None
) -> dict[str, Basis]:
    """One basis object a kind, copied, in the precision of the weights but at least float32.

    Args:
        core: k and ranks of the truncated form, which is given the leading rows alone; None gives all rows.
    """
    if bases is None:
        return {}
    shared = {}
    for target in targets:
        kind = target.kind
        if kind in shared:
            continue
        if kind not in bases:
            raise ValueError(f"no basis for layer kind {kind!r}; given: {', '.join(bases) or 'none'}.")
        weight, basis = target.module.weight, bases[kind]
        r, c = basis.ranks
        if core is not None:
            k, ranks = _of_kind(core[0], kind, "k"), _of_kind(core[1], kind, "ranks")
            try:
                r, c = checked_ranks(k, ranks, basis)
            except ValueError as error:
                raise ValueError(f"{target.name}: {error}") from None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        factors = (factor.to(device=weight.device, dtype=dtype, copy=True) for factor in (basis.U[:c], basis.V[:r]))
        shared[kind] = Basis(*factors)
    return shared
