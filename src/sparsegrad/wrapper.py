"""A module around a model that passes for it: its attributes, the signature of its ``forward``, its class' name."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, Self, cast

from torch import nn


class Wrapper(nn.Module):
    """Calls a model; attributes that it has not are the model's (``config``, ``generate``, ``device``).

    Its class is made for the class of the model: a Trainer reads columns and labels in the signature of the class'
    ``forward``, and the kind of loss in the class' name. It is copied and pickled as any module. Its state has tied
    tensors under their first name alone, as safetensors asks.

    Attributes:
        base_model: the model.
    """

    base_model: nn.Module
    _hf_peft_config_loaded = True  # so that a Trainer takes a quantised model: what trains stands beside its weights

    def __new__(cls, model: nn.Module, *_: Any, **__: Any) -> Self:
        """An instance of the class for this model's."""
        return super().__new__(cast(type[Self], _class_for(cls, type(model))))

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] - without the positions that torch deprecates
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """As torch's, without the second names of tied tensors."""
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name in self._second_names():
            state.pop(prefix + name, None)
        return state

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] - torch gives them by position
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        for name, first in self._second_names().items():
            if prefix + first in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + first])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _second_names(self) -> dict[str, str]:
        """Of parameters and buffers with several names, each but the first, and the first."""
        first: dict[int, str] = {}
        own = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        return {name: first[id(t)] for name, t in own if first.setdefault(id(t), name) != name}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet
                raise
            return getattr(self.base_model, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = type(self).__mro__[1]  # the made class itself can't be found by its name
        return _empty, (own, type(self.base_model)), self.__getstate__()


@cache
def _class_for(own: type[Wrapper], base: type[nn.Module]) -> type[Wrapper]:
    """The class of what wraps a model of this class."""

    @wraps(cast(Any, base).forward)
    def forward(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    names = {"forward": forward, "__module__": own.__module__, "__qualname__": f"{own.__name__}[{base.__name__}]"}
    return type(base.__name__, (own,), names)


def _empty(own: type[Wrapper], base: type[nn.Module]) -> Wrapper:
    """What a copy or a pickle is put in."""
    return object.__new__(_class_for(own, base))
