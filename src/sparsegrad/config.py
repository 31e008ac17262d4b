"""What an adapter is made with, as one checked object that a JSON file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from sparsegrad.convert import FORMS, kind_value, own_options, sparsegrad_layers
from sparsegrad.rotated import MATMULS
from sparsegrad.rotation import PRECISIONS
from sparsegrad.select import entries_for_density
from sparsegrad.selecting import SELECT_IN
from sparsegrad.targets import TargetModules, find_targets, resolve_targets
from sparsegrad.truncated import UPDATES

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
FILE = "adapter_config.json"
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
OPTIONS = ("select_in", "rotation", "matmul", "ranks", "keep", "update")
_WORDS = {"select_in": SELECT_IN, "rotation": PRECISIONS, "matmul": MATMULS, "update": (None, *UPDATES)}


@dataclass(frozen=True, kw_only=True)
class SparseGradConfig:
    """The arguments of :func:`sparsegrad.sparsify`, and what else :func:`sparsegrad.get_sparsegrad_model` asks.

    Attributes:
        k: entries kept in each matrix; by layer kind as a dictionary. Either this or ``density``.
        density: the share of a matrix' entries instead, above 0 and at most 1; by layer kind as a dictionary.
        form: ``folded``, ``rotated`` or ``truncated``.
        target_modules: a dictionary, a list, a regular expression or ``"all-mlp"`` (:mod:`sparsegrad.targets`).
        layers_to_transform: block indices; None takes all.
        modules_to_save: modules outside the targets that train in full and are saved, as the head of a classifier. An
            entry is a module's name or its end (``classifier``, ``pre_classifier.dense``).
        select_in, rotation, matmul, ranks, keep, update: options of the form, see :func:`sparsegrad.sparsify`.
        keep_base: keep what the adapter replaces, on the CPU. Without it what needs the base again is refused, but for
            ``update="side"``, which leaves the base's weights as they are.
        base_model_name_or_path: of the base model; None takes what the model says of itself.
        task_type: as PEFT calls it; ``SEQ_CLS``, ``TOKEN_CLS`` and ``QUESTION_ANS`` add the head to
            ``modules_to_save``, as there.

    Raises:
        ValueError: if a field is out of range, unknown to the form, or neither or both of k and density are given.
    """

    k: int | Mapping[str, int] | None = None
    density: float | Mapping[str, float] | None = None
    form: str = "folded"
    target_modules: TargetModules = "all-mlp"
    layers_to_transform: Sequence[int] | None = None
    modules_to_save: Sequence[str] | None = None
    select_in: str | Mapping[str, str] = "step"
    rotation: str | Mapping[str, str] = "auto"
    matmul: str | Mapping[str, str] = "regular"
    ranks: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    keep: int | Mapping[str, int] | None = None
    update: str | Mapping[str, str] | None = None
    keep_base: bool = True
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    peft_type: ClassVar[str] = "SPARSEGRAD"

    def __post_init__(self) -> None:
        if (self.k is None) == (self.density is None):
            raise ValueError(
                f"k={self.k!r}, density={self.density!r}; give one of them: entries kept in each matrix, or their "
                "share (the paper keeps about 0.01)."
            )
        for value in _each(self.density):
            entries_for_density(value, (1, 1))
        if any(type(value) is not int or value < 1 for value in (*_each(self.k), *_each(self.keep))):
            raise ValueError(f"k={self.k!r}, keep={self.keep!r}; allowed: whole numbers from 1, also by layer kind.")
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}; allowed: {', '.join(FORMS)}.")
        for name, allowed in _WORDS.items():
            if any(value not in allowed for value in _each(getattr(self, name), absent=None)):
                words = ", ".join(str(word) for word in allowed)
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {words}, also by layer kind.")
        own_options(self.form, self.options)
        if self.task_type not in (None, *TASKS):
            raise ValueError(f"task_type={self.task_type!r}; allowed: {', '.join(TASKS)}, or None.")
        self._take_lists()
        if not isinstance(self.keep_base, bool):
            raise ValueError(f"keep_base={self.keep_base!r}; allowed: True, False.")

    def _take_lists(self) -> None:
        """Check what may be a list, and hold it as JSON does."""
        for name, kind in (("layers_to_transform", int), ("modules_to_save", str), ("target_modules", str)):
            value = getattr(self, name)
            if value is None or (name == "target_modules" and isinstance(value, str | Mapping) and value):
                continue
            if isinstance(value, str | Mapping) or not value or any(type(item) is not kind for item in value):
                raise ValueError(f"{name}={value!r}; allowed: a list of {kind.__name__}, one or more.")
            object.__setattr__(self, name, list(value))

    @property
    def options(self) -> dict[str, Any]:
        """Those of forms, by name; one that the form does not take has its default."""
        return {name: getattr(self, name) for name in OPTIONS}

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """Those of :func:`sparsegrad.sparsify` for a plain model, but for bases and rule; with k, without density.

        Raises:
            ValueError: if the model has no such targets, or a layer kind has no k.
        """
        targets = find_targets(model, self.target_modules, self.layers_to_transform)
        k = self.k
        if self.density is not None:
            k = {t.kind: entries_for_density(kind_value(self.density, t.kind, "density"), t.shape) for t in targets}
        given = {"target_modules": self.target_modules, "layers_to_transform": self.layers_to_transform}
        return {"k": k, **given, "form": self.form, **own_options(self.form, self.options)}

    def completed(self, model: nn.Module) -> SparseGradConfig:
        """With what a plain model says of it: targets as a dictionary, the head of its task, its name.

        Raises:
            ValueError: if ``modules_to_save`` names nothing, or holds a target.
        """
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        heads = [head for head in _HEADS.get(self.task_type or "", ()) if any(_ends(name, head) for name in names)]
        saved = list(dict.fromkeys([*(self.modules_to_save or ()), *heads]))
        if unknown := [end for end in saved if not any(_ends(name, end) for name in names)]:
            raise ValueError(f"modules_to_save: no module is, or ends with, {', '.join(unknown)}.")
        full = replace(
            self,
            target_modules=resolve_targets(model, self.target_modules),
            modules_to_save=saved or None,
            base_model_name_or_path=self.base_model_name_or_path or getattr(model, "name_or_path", None) or None,
        )
        own = full.saved_names(model)
        targets = [t.name for t in find_targets(model, full.target_modules, full.layers_to_transform)]
        if both := [t for t in targets if {f"{t}.weight", t.rpartition(".")[0]} & own]:
            raise ValueError(f"modules_to_save holds {', '.join(both[:4])}, which target_modules names: leave it out.")
        return full

    def saved_names(self, model: nn.Module) -> set[str]:
        """All names of the parameters and buffers in ``modules_to_save``."""
        ends = self.modules_to_save or ()
        modules = {n for n, _ in model.named_modules(remove_duplicate=False) if any(_ends(n, end) for end in ends)}
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        own = {id(t) for name, t in tensors.items() if any(name.startswith(f"{module}.") for module in modules)}
        return {name for name, tensor in tensors.items() if id(tensor) in own}  # tied ones too

    def let_train(self, model: nn.Module) -> None:
        """Of a model with the adapter: the weights of SparseGrad layers and ``modules_to_save``, and nothing else."""
        model.requires_grad_(False)
        for layer in sparsegrad_layers(model).values():
            layer.trained.requires_grad_(True)
        own = self.saved_names(model)
        for name, parameter in model.named_parameters():
            if name in own:
                parameter.requires_grad_(True)

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``peft_type``, as JSON holds them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.loads(json.dumps({"peft_type": self.peft_type} | values))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseGradConfig:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: if it is of another ``peft_type``, or has a key that is no field.
        """
        if values.get("peft_type") != cls.peft_type:
            raise ValueError(f"peft_type={values.get('peft_type')!r}; a SparseGradConfig has {cls.peft_type!r}.")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - {*known, "peft_type"}):
            other = (
                " It is of sparsegrad.peft, whose adapters peft.PeftModel loads." if "peft_version" in values else ""
            )
            raise ValueError(f"unknown keys {', '.join(unknown)}; a SparseGradConfig has {', '.join(known)}.{other}")
        return cls(**{name: value for name, value in values.items() if name != "peft_type"})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``adapter_config.json`` to a directory, which is made where it is missing."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f".{FILE}"
        part.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        part.replace(directory / FILE)  # whole, or not at all

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> SparseGradConfig:
        """Read ``adapter_config.json`` from a directory.

        Raises:
            ValueError: if there is none, it is no JSON, or as :meth:`from_dict`.
        """
        path = Path(directory) / FILE
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} can't be read ({error}): give a directory of save_pretrained.") from None
        try:
            return cls.from_dict(values)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None


def _ends(name: str, end: str) -> bool:
    """Whether a module is called so, or ends so, as PEFT matches names."""
    return f".{name}".endswith(f".{end}")


def _each(value: Any, absent: Any = ()) -> list[Any]:
    """An option's values of all layer kinds; None is none, or stands for itself."""
    if isinstance(value, Mapping):
        return list(value.values())
    return [value] if value is not None or absent is None else []
