"""From a plain model to SparseGrad layers and back; :mod:`sparsegrad.targets` says which matrices are meant."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from sparsegrad import experts
from sparsegrad.basis import Basis, own_rows
from sparsegrad.fingerprint import fingerprint, fingerprints
from sparsegrad.folded import FoldedLinear
from sparsegrad.linear import SparseGradLinear
from sparsegrad.origin import origin_of
from sparsegrad.quantized import QuantizedTruncatedLinear, is_quantized
from sparsegrad.rotated import RotatedLinear
from sparsegrad.select import Rule, top_k
from sparsegrad.targets import Target, TargetModules, find_targets, is_transposed, resolve_targets
from sparsegrad.truncated import TruncatedLinear

FORMS = {"folded": FoldedLinear, "rotated": RotatedLinear, "truncated": TruncatedLinear}


def sparsify(
    model: nn.Module,
    bases: Mapping[str, Basis] | None,
    k: int | Mapping[str, int],
    target_modules: TargetModules,
    layers_to_transform: Sequence[int] | None = None,
    *,
    form: str = "folded",
    select: Rule = top_k,
    **options: Any,
) -> nn.Module:
    """Replace the target layers in place; the function of the model does not change.

    Args:
        model: a plain model.
        bases: one for each layer kind, shared by all blocks; None for no rotation (MeProp's space).
        k: entries kept in each matrix; for the truncated form, entries of the core.
        target_modules, layers_to_transform: see :func:`find_targets`.
        form: ``folded`` (default), ``rotated`` or ``truncated``.
        select: which k entries are kept, a function of a gradient ``(out_features, in_features)`` in rotated
            coordinates and k to flat indices: int64, ascending, no duplicates. It is called once a matrix and step.
        options: of the form, as its layers take them: ``select_in`` (folded, rotated), ``rotation`` (folded),
            ``matmul`` (rotated), ``ranks``, ``keep`` and ``update`` (truncated); see :class:`sparsegrad.FoldedLinear`,
            :class:`sparsegrad.RotatedLinear`, :class:`sparsegrad.TruncatedLinear`. An option that a form does not take
            may be given with its default. These and k may be given by layer kind.

    Returns:
        The same model.

    Raises:
        ValueError: on an unmatched or tied target, a basis that is missing, not orthonormal or of other shapes, k out
            of range, or an unknown option.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}; allowed: {', '.join(FORMS)}.")
    options = own_options(form, options)
    patterns = resolve_targets(model, target_modules)
    targets = find_targets(model, patterns, layers_to_transform)
    _refuse_what_cannot_be_replaced(model, targets, form)
    base = {} if any(p.is_meta for p in model.parameters()) else fingerprints(model)
    shared: dict[str, Basis] = {}
    built: list[SparseGradLinear] = []
    for target in targets:  # build all before replacing any: an error leaves the model as it was
        try:
            own = {name: kind_value(value, target.kind, name) for name, value in ({"k": k} | options).items()}
            known = target.kind in shared
            if bases is not None:
                basis = basis_of(bases, target.kind)
                own |= FORMS[form].options_by(basis, **own)
                if not known:
                    shared[target.kind] = own_rows(basis, target.weight, own.get("ranks", basis.ranks))
            built.append(layer := _layer(form, target, shared.get(target.kind), select, own))
            layer.base, layer.start = base, fingerprint(layer.stored) if base else ""
            if known:
                layer.borrow_basis()
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
    given = {"k": k, "target_modules": patterns, "layers_to_transform": layers_to_transform, "form": form}
    arguments = _as_json(given | options)
    for layer in built:
        layer.arguments = arguments
    _put_in(model, targets, built)
    _leave_fast_paths(model)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Replace every SparseGrad layer by what stood there, with the layer's function, in place.

    Returns:
        The same model, plain again: ``save_pretrained`` and FastChat take it.
    """
    experts.put_back(model)
    _replace(model, {layer: _plain(layer) for layer in sparsegrad_layers(model).values()})
    return model


def _plain(layer: SparseGradLinear) -> nn.Module:
    linear = layer.to_linear()
    return (linear if layer.origin is None else layer.origin.restored(linear)).train(layer.training)


def _put_in(model: nn.Module, targets: Sequence[Target], layers: Sequence[SparseGradLinear]) -> None:
    """Every layer in its target's place."""
    modules: dict[nn.Module, nn.Module] = {}
    lists: dict[tuple[nn.Module, str], list[SparseGradLinear]] = {}
    for target, layer in zip(targets, layers, strict=True):
        if target.expert is None:
            modules[target.module] = layer
        else:
            lists.setdefault((target.module, target.parameter), []).append(layer)
    _replace(model, modules)
    experts.put_in(model, lists)


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Under every name that a module has: blocks may share it."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])


def sparsegrad_layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    """SparseGrad layers by full module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseGradLinear)}


def _leave_fast_paths(model: nn.Module) -> None:
    """torch's encoder reads its linears' weights past their forward, unless a module in it has a hook."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in sparsegrad_layers(module).values():
                layer.register_forward_pre_hook(_go_through_forward)
        elif isinstance(module, nn.TransformerEncoder) and sparsegrad_layers(module):
            module.use_nested_tensor = False  # nested tensors are made for that path


def _go_through_forward(*_: object) -> None: ...


def _refuse_what_cannot_be_replaced(model: nn.Module, targets: Sequence[Target], form: str) -> None:
    """Raise ValueError for layers of this library, tied parameters, and layers whose weight is read past forward."""
    if any(isinstance(t.module, SparseGradLinear) for t in targets):
        raise ValueError("the model holds SparseGrad layers already: merge(model) first.")
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
    for target in targets:
        own = target.module.parameters(recurse=False) if target.expert is None else [target.weight]
        for parameter in own:
            if len(names[id(parameter)]) > 1:
                raise ValueError(
                    f"{target.name}: {' and '.join(names[id(parameter)][:3])} are tied, and SparseGrad would train a "
                    "copy of one of them: leave it out of target_modules, or untie them first."
                )
        if target.expert is not None:
            experts.refuse_transposed(target.module)
            continue
        parent = model.get_submodule(target.name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention) and form != "folded":
            raise ValueError(f"{target.name}: nn.MultiheadAttention reads its weight itself: use form='folded'.")


def kind_value(value: Any, kind: str, name: str) -> Any:
    """An option of one layer kind: it may be given for all kinds at once."""
    if not isinstance(value, Mapping):
        return value
    if kind not in value:
        raise ValueError(f"no {name} for layer kind {kind!r}; given: {', '.join(value) or 'none'}.")
    return value[kind]


def basis_of(bases: Mapping[str, Basis], kind: str) -> Basis:
    """That of a kind; ValueError if there is none, or what was given holds no bases."""
    if not isinstance(bases, Mapping):
        raise ValueError(
            f"bases is a {type(bases).__name__}; give a mapping, layer kind to Basis (of a file: load_bases(path)[0])."
        )
    basis = kind_value(bases, kind, "basis")
    if not isinstance(basis, Basis):
        raise ValueError(f"bases[{kind!r}] is a {type(basis).__name__}; give a Basis, hosvd of moments makes one.")
    return basis


def own_options(form: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the form's layers take; the others must be as if they had not been given."""
    taken = {name: _defaults(layer_class) for name, layer_class in FORMS.items()}
    every = {name: default for defaults in taken.values() for name, default in defaults.items()}
    for name, value in options.items():
        if name not in taken[form] and (name not in every or value != every[name]):
            takes = ", ".join(taken[form])
            raise ValueError(f"{name}={value!r} is no option of form={form!r}, which takes {takes}.")
    return {name: value for name, value in options.items() if name in taken[form]}


def _as_json(value: Any) -> Any:
    """Arguments as JSON keeps them: tuples and ranges as lists."""
    if isinstance(value, Mapping):
        return {kind: _as_json(item) for kind, item in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    return [_as_json(item) for item in value]


def _defaults(layer_class: type[SparseGradLinear]) -> dict[str, Any]:
    """A form declares its options as the keyword arguments of its layers."""
    parameters = inspect.signature(layer_class).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "select"}


def _layer(form: str, target: Target, basis: Basis | None, select: Rule, options: dict[str, Any]) -> SparseGradLinear:
    """What stands in the target's place."""
    module, weight = target.module, target.weight
    quantized = isinstance(module, nn.Linear) and is_quantized(module)
    if quantized and form != "truncated":
        raise ValueError(f"the weight is quantised ({type(module).__name__}): use form='truncated'.")
    if isinstance(module, nn.Linear) and quantized:
        layer = QuantizedTruncatedLinear(module, basis, select=select, **options)
    else:
        bias = None if target.expert is not None else cast(Tensor | None, module.bias)
        layer = FORMS[form](target.matrix(weight.detach()).contiguous(), bias, basis, select=select, **options)
        layer.origin = None if target.expert is not None else origin_of(module, is_transposed(module))
    layer.kind, layer.name = target.kind, target.name
    layer.trained.requires_grad_(quantized or weight.requires_grad)
    return layer.train(module.training)
