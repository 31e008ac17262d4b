"""Exact parameter counts from an architecture alone, on torch's meta device: no weights, no download, no memory.

Parts of the model, as the paper's Table 1 splits them:

    MLP         both linear layers of a block (all three of LLaMa), weights and biases
    attention   query, key, value and output projections, weights and biases
    embeddings  word, position and type tables of an encoder; the input table of LLaMa (not its output head)
    the rest    LayerNorms, the pooler, the output head: in the total only
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ENCODER = {
    "mlp": r"encoder\.layer\.\d+\.(intermediate|output)\.dense\.(weight|bias)",
    "attention": r"encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)\.(weight|bias)",
    "embeddings": r"embeddings\.(word|position|token_type)_embeddings\.weight",
}
_LLAMA = {
    "mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.(weight|bias)",
    "attention": r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.(weight|bias)",
    "embeddings": r"model\.embed_tokens\.weight",
}
_MPNET = _ENCODER | {"attention": r"encoder\.layer\.\d+\.attention\.attn\.[qkvo]\.(weight|bias)"}
PARTS = {"bert": _ENCODER, "roberta": _ENCODER, "llama": _LLAMA, "mpnet": _MPNET, "gemma3_text": _LLAMA}
"""Model type -> part -> regular expression over the full name of a parameter."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model (an encoder without a task head, LLaMa with its output head) and its parts."""

    total: int
    mlp: int
    attention: int
    embeddings: int

    def share(self, part: str) -> float:
        """Share of a part in the model, in percent."""
        return 100 * getattr(self, part) / self.total


def count_parameters(architecture: Mapping[str, Any]) -> ParameterCounts:
    """Count the parameters of an architecture without allocating them.

    Args:
        architecture: Arguments of a transformers configuration with `model_type`, one of `PARTS`. A tied matrix counts
            once.

    Raises:
        ValueError: If the model type is none of these, or a part of the model was not found by its name.
    """
    kind = architecture.get("model_type")
    if kind not in PARTS:
        raise ValueError(f"model_type={kind!r} cannot be counted by part; allowed are {', '.join(PARTS)}")
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(architecture).items()}
    parts = {
        part: sum(size for name, size in sizes.items() if re.fullmatch(pattern, name))
        for part, pattern in PARTS[kind].items()
    }
    missing = [part for part, count in parts.items() if count == 0]
    if missing:
        raise ValueError(
            f"no parameter of {kind} matches {missing}; its modules were renamed: adapt PARTS to {[*sizes]}"
        )
    return ParameterCounts(total=sum(sizes.values()), **parts)


def parameter_shapes(architecture: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter, on the meta device; torch is imported here because it costs seconds."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(**architecture)
    auto = AutoModelForCausalLM if PARTS.get(config.model_type) is _LLAMA else AutoModel
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in auto.from_config(config).named_parameters()}
