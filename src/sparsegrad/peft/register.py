"""Makes the method known to peft, through the three mappings that :func:`peft.utils.register_peft_method` writes.

That function itself refuses names outside the enumeration ``PeftType``, which nobody can extend from outside.
"""

from __future__ import annotations

import peft
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner

from sparsegrad.peft.config import SparseGradConfig, SparseGradType
from sparsegrad.peft.model import SparseGradModel

MAPPINGS = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
HOOKS = ("_create_and_replace", "_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")


def register() -> None:
    """Let peft build, save and load this method; again, it changes nothing.

    Raises:
        ImportError: if the installed peft has no place for it, or has a method of this name itself.
    """
    lacking = [name for name in MAPPINGS if not isinstance(getattr(mapping, name, None), dict)]
    lacking += [name for name in HOOKS if not hasattr(BaseTuner, name)]
    if lacking:
        raise ImportError(f"sparsegrad.peft works with peft 0.21; {peft.__version__} lacks {', '.join(lacking)}.")
    key = SparseGradType.SPARSEGRAD
    known = getattr(mapping, MAPPINGS[0]).get(key, SparseGradConfig)
    if known is not SparseGradConfig:
        raise ImportError(
            f"peft {peft.__version__} has a method {key.value} of its own ({known.__module__}): use that."
        )
    for name, value in zip(MAPPINGS, (SparseGradConfig, SparseGradModel, SparseGradModel.prefix), strict=True):
        getattr(mapping, name)[key] = value
