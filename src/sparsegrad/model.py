"""PEFT's words for a model with SparseGrad adapters (``get_peft_model``, ``PeftModel``), with torch alone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sparsegrad.adapter import BASES, AdapterState, adapter_state
from sparsegrad.config import SparseGradConfig
from sparsegrad.counts import numbers
from sparsegrad.fingerprint import fingerprints
from sparsegrad.named import Bases, NamedAdapter, check_name
from sparsegrad.swap import Swap
from sparsegrad.wrapper import Wrapper


def get_sparsegrad_model(
    model: nn.Module, config: SparseGradConfig, bases: Bases, adapter_name: str = "default"
) -> SparseGradModel:
    """A model with an adapter to train, as ``peft.get_peft_model`` gives one.

    The function of the model does not change yet. The weights of SparseGrad layers and ``modules_to_save`` train, and
    nothing else, whatever was frozen before.

    Args:
        model: a plain model; changed in place, as there.
        config: see :class:`sparsegrad.SparseGradConfig`.
        bases: by layer kind, or a file of :func:`sparsegrad.save_bases`; None for no rotation, where the form has that.
        adapter_name: letters, digits, ``_``, ``-`` and ``.``: adapters but ``default`` are saved in a folder of that
            name.

    Raises:
        ValueError: as :func:`sparsegrad.sparsify`, or if ``modules_to_save`` names nothing, or something that holds a
            target; the model is as it was then.
    """
    if isinstance(model, SparseGradModel):
        raise ValueError("the model has adapters already: model.add_adapter(name, config, bases) gives it another.")
    return SparseGradModel(model, NamedAdapter.new(config, model), bases, adapter_name)


class SparseGradModel(Wrapper):
    """A model and its adapters; it passes for the model where that is asked for (attributes, signature, class' name).

    One adapter is active: its layers stand in the model. The others wait as :class:`sparsegrad.AdapterState`. What an
    adapter replaces is kept (``keep_base``), so that the base model can come back:

    - ``disable_adapter``, ``unload``: the base model to the bit, where nothing was changed but what the adapter trains.
    - ``merge_adapter`` and ``unmerge_adapter``, ``disable_adapter`` and its end: the adapter to the bit; its optimizer
      goes on.
    - ``set_adapter``: what ``save_pretrained`` and ``from_pretrained`` would give. An adapter that was trained since it
      was set comes back within rounding, and from then on to the bit, until it is trained again. Its layers are new:
      an optimizer of the earlier ones refuses to step, and a new one takes its place.

    :func:`get_sparsegrad_model` and :meth:`from_pretrained` make it.

    Attributes:
        base_model: the model; while an adapter is active, with its layers.
    """

    def __init__(self, model: nn.Module, adapter: NamedAdapter, bases: Bases, adapter_name: str) -> None:
        check_name(adapter_name)
        super().__init__(model)
        self._adapters = {adapter_name: adapter}
        self._swap: Swap | None = adapter.put_in(model, bases)
        self._set(adapter_name)
        self._train(True)

    # ---- what trains ----

    def thaw(self) -> None:
        """Let the weights of SparseGrad layers and ``modules_to_save`` train, and nothing else.

        :func:`sparsegrad.param_groups` begins with it, so that freezing in between makes no difference.

        Raises:
            ValueError: if the adapter was loaded or set for inference, or is merged or disabled.
        """
        if self._inference:
            raise ValueError(
                f"adapter {self.active_adapter!r} is set for inference: call set_adapter({self.active_adapter!r}), or "
                "from_pretrained(..., is_trainable=True), to train it."
            )
        self._refuse_unless_adapted("training")
        self._train(True)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers that a step moves, and all parameters.

        A SparseGrad weight counts with its k entries: other ones may move in the next step.
        """
        moved, _, every = numbers(self)
        return moved, every

    def print_trainable_parameters(self) -> None:
        """Print :meth:`get_nb_trainable_parameters` in PEFT's line, and how many parameters they lie in."""
        moved, trained, every = numbers(self)
        sys.stdout.write(
            f"trainable params: {moved:,d} || all params: {every:,d} || trainable%: {100 * moved / every:.4f} "
            f"(moved in a step; they lie in {trained:,d} parameters)\n"
        )

    # ---- several adapters ----

    @property
    def peft_config(self) -> dict[str, SparseGradConfig]:
        """Of every adapter, by name; ``target_modules`` as the dictionary that they stand for."""
        return {name: adapter.config for name, adapter in self._adapters.items()}

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that is set."""
        _ = self._now
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        """A list of it, as PEFT has one."""
        return [self.active_adapter]

    def add_adapter(self, adapter_name: str, config: SparseGradConfig, bases: Bases) -> None:
        """Add an adapter that changes nothing yet; it waits for :meth:`set_adapter`.

        Raises:
            ValueError: as :func:`get_sparsegrad_model`, if the name is taken, or the base was not kept.
        """
        with self._base_for(adapter_name):
            self._add(adapter_name, NamedAdapter.new(config, self.base_model), bases)

    def load_adapter(self, directory: str | Path, adapter_name: str, *, bases: Bases = None) -> None:
        """Add an adapter from a directory of :meth:`save_pretrained`; it waits for :meth:`set_adapter`.

        Args:
            directory: of this adapter: that of all for ``default``, else the folder in it.
            adapter_name: a new one; it may be another one than it was saved under.
            bases: see :meth:`from_pretrained`.

        Raises:
            ValueError: as :meth:`add_adapter` and :func:`sparsegrad.load_adapter`.
        """
        with self._base_for(adapter_name):
            self._add(adapter_name, *NamedAdapter.read(directory, bases))

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter the active one; the one that was waits. See the class for what is exact.

        Args:
            adapter_name: of an adapter that was added; the active one stays, with its optimizer.
            inference_mode: freeze it; else it trains.

        Raises:
            ValueError: if there is none of that name, the base was not kept, the active one is merged or disabled, or
                others than it may move were changed. Nothing has changed then.
        """
        self._known(adapter_name)
        self._refuse_unless_adapted("set_adapter")
        if adapter_name != self._active:
            old, state = self._now, self._state()
            old.show("base", "set_adapter")
            try:
                self._swap = self._adapters[adapter_name].put_in(self.base_model)
            except BaseException:
                old.show("adapted", "set_adapter")
                raise
            self._adapters[self._active].state = state
            self._set(adapter_name)
        self._train(not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; after the active one, the first of the others is set, with a warning, as in PEFT.

        Raises:
            ValueError: if there is none of that name, or no other.
        """
        self._known(adapter_name)
        others = [name for name in self._adapters if name != adapter_name]
        if not others:
            raise ValueError(f"{adapter_name!r} is the only adapter: unload() gives the base model.")
        if adapter_name == self._active:
            warnings.warn(f"adapter {adapter_name!r} was active; {others[0]!r} is set now.", stacklevel=2)
            self.set_adapter(others[0])
        del self._adapters[adapter_name]

    # ---- with and without the adapter ----

    def disable_adapter(self) -> AbstractContextManager[None]:
        """A context in which the base model stands in the adapter's place, to the bit.

        Raises:
            ValueError: on entry, if the base was not kept.
        """
        return self._now.showing("base", "disable_adapter")

    def merge_adapter(self) -> None:
        """Put plain layers in the place of the adapter's, as :func:`sparsegrad.merge` does; its own are kept."""
        self._now.show("merged", "merge_adapter")

    def unmerge_adapter(self) -> None:
        """Put the adapter's layers back: as they were, to the bit."""
        self._now.show("adapted", "unmerge_adapter")

    def merge_and_unload(self) -> nn.Module:
        """The model with the active adapter in its weights, plain and frozen; all adapters are forgotten."""
        return self._left("merged", "merge_and_unload")

    def unload(self) -> nn.Module:
        """The base model, to the bit, and frozen; all adapters are forgotten.

        Raises:
            ValueError: if it was not kept.
        """
        return self._left("base", "unload")

    def get_base_model(self) -> nn.Module:
        """The model, with the layers of the active adapter."""
        return self.base_model

    # ---- files ----

    def save_pretrained(
        self, save_directory: str | Path, selected_adapters: list[str] | None = None, *, bases: str = "inside"
    ) -> None:
        """Write each adapter's ``adapter_config.json``, ``adapter_model.safetensors`` and ``bases.safetensors``.

        Args:
            save_directory: of ``default``; others lie in a folder of their name in it.
            selected_adapters: by name; None takes all.
            bases: ``inside``, or ``reference``: their hashes alone, without ``bases.safetensors``; whoever loads the
                adapter gives them.

        Raises:
            ValueError: on a word or name that is not known, or if others than an adapter may move were changed.
        """
        if bases not in BASES:
            raise ValueError(f"bases={bases!r}; allowed: {', '.join(BASES)}.")
        active = self.active_adapter
        names = list(self._adapters) if selected_adapters is None else selected_adapters
        for name in names:
            self._known(name)
        for name in names:
            adapter = self._adapters[name]
            held = NamedAdapter(adapter.config, self._state()) if name == active else adapter
            held.write(Path(save_directory) if name == "default" else Path(save_directory) / name, bases)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        directory: str | Path,
        adapter_name: str = "default",
        *,
        bases: Bases = None,
        is_trainable: bool = False,
    ) -> SparseGradModel:
        """A base model with an adapter from a directory of :meth:`save_pretrained`.

        Args:
            model: the base model that was fine-tuned, plain; changed in place.
            directory: see :meth:`load_adapter`.
            adapter_name: what the adapter is called from now on.
            bases: by layer kind, or a file of :func:`sparsegrad.save_bases`: those that the adapter refers to; None
                takes the directory's own.
            is_trainable: let it train; else it is frozen, and the model in evaluation mode.

        Raises:
            ValueError: if a file is missing or damaged, or as :func:`sparsegrad.load_adapter`.
        """
        loaded = SparseGradModel(model, *NamedAdapter.read(directory, bases), adapter_name)
        loaded._train(is_trainable)
        return loaded if is_trainable else loaded.eval()

    # ---- of the class ----

    @property
    def _now(self) -> Swap:
        if self._swap is None:
            raise ValueError("the adapters were unloaded: get_sparsegrad_model(model, config, bases) makes a new one.")
        return self._swap

    def _refuse_unless_adapted(self, word: str) -> None:
        if self._now.state != "adapted":
            raise ValueError(
                f"{word} needs the adapter in its place, and it is merged or disabled: call unmerge_adapter(), or "
                "leave disable_adapter(), first."
            )

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            raise ValueError(f"no adapter {name!r}; there are {', '.join(self._adapters) or 'none'}.")

    def _set(self, name: str) -> None:
        """Note what stands in the model now."""
        self._active = name
        self._marks = None if self._adapters[name].state is None else fingerprints(self.base_model)

    def _train(self, trains: bool) -> None:
        self._inference = not trains
        if trains:
            self._adapters[self._active].config.let_train(self.base_model)
        else:
            self.base_model.requires_grad_(False)

    @contextmanager
    def _base_for(self, name: str) -> Generator[None]:
        """The base, while an adapter of this name is made in it."""
        check_name(name)
        if name in self._adapters:
            raise ValueError(f"there is an adapter {name!r}: delete_adapter({name!r}) first, or give another name.")
        with self._now.showing("base", "another adapter"):
            yield

    def _add(self, name: str, adapter: NamedAdapter, bases: Bases) -> None:
        swap = adapter.put_in(self.base_model, bases, keep_base=True)
        adapter.state = adapter.state or adapter_state(self.base_model)
        swap.show("base", name)
        self._adapters[name] = adapter

    def _state(self) -> AdapterState:
        """Of the active adapter: the one that was put, unless something has changed since."""
        adapter = self._adapters[self.active_adapter]
        with self._now.showing("adapted", "saving"):
            if adapter.state is not None and self._marks == fingerprints(self.base_model):
                return adapter.state
            state = adapter_state(self.base_model)
            adapter.refuse_others(state, self.base_model)
            return state

    def _left(self, state: Any, word: str) -> nn.Module:
        self._now.show(state, word)
        self._adapters.clear()
        self._swap = None
        return self.base_model.requires_grad_(False)
