"""Trainable share of LLaMa-2-7B by method and by which matrices train: three readings of one printed column.

Exact arithmetic on the shapes that the meta device gives; with `n` matrices of shape (o, i) in a model of `P` numbers

    Regular FT    n o i / P            LoRA    n r (o + i) / P            SparseGrad, MeProp    n k / P
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.report.paper.architectures import parameter_shapes
from finetune.report.paper.layouts import METHODS

_MATRIX = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_TEXT, _GATED = ("up", "down"), ("gate", "up", "down")


@dataclass(frozen=True)
class Variant:
    """A reading of which matrices train, such as `up+down of 11 blocks`; method -> trainable percent of the model."""

    name: str
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Shares:
    """The shares of one model.

    Attributes:
        variants: The text's reading first: `up+down` of the selected blocks; with `gate`; `up+down` of all blocks.
        matrix: Entries of one matrix.
        gate: Share of the gate matrices of the selected blocks, in percent.
        k: Entries that SparseGrad and MeProp keep of a matrix.
    """

    total: int
    variants: tuple[Variant, ...]
    matrix: int
    gate: float
    k: int
    rank: int


def trainable_shares(model: Mapping[str, Any]) -> Shares:
    """Compute the shares of a LLaMa model.

    Args:
        model: Its configuration (`conf/model`): `architecture`, `layers_to_transform`, `lora_rank`, `k`.

    Raises:
        ValueError: If the architecture is no LLaMa, its modules were renamed, or a selected block is not there.
    """
    from finetune.methods import Targets
    from finetune.methods.full import FullFineTuning
    from finetune.methods.lora import LoRA
    from finetune.methods.meprop import MeProp
    from finetune.methods.sparsegrad import SparseGrad

    if model["architecture"].get("model_type") != "llama":
        raise ValueError(f"model_type={model['architecture'].get('model_type')!r}; shares are computed of llama only")
    every = parameter_shapes(model["architecture"])
    total, matches = sum(map(math.prod, every.values())), {name: _MATRIX.fullmatch(name) for name in every}
    matrices = [(int(match[1]), match[2], every[name]) for name, match in matches.items() if match]
    if not matrices:
        raise ValueError("no parameter of llama is an MLP matrix by its name; its modules were renamed: adapt this")
    blocks = sorted({block for block, _, _ in matrices})
    selected = blocks if model["layers_to_transform"] is None else [*model["layers_to_transform"]]
    if unknown := sorted(set(selected) - set(blocks)):
        raise ValueError(f"layers_to_transform has {unknown}; the model's blocks are 0 to {blocks[-1]}")
    targets, k, rank = Targets(target_modules={}), model["k"], model["lora_rank"]
    methods = {
        "full": FullFineTuning(targets),
        "lora": LoRA(targets, arguments={"r": rank}),
        "sparsegrad": SparseGrad(targets, bases={}, k=k),
        "meprop": MeProp(targets, k=k),
    }
    variants = []
    for kinds, of in ((_TEXT, selected), (_GATED, selected), (_TEXT, blocks)):
        shapes = [shape for block, kind, shape in matrices if kind in kinds and block in of]
        shares = {name: 100 * sum(map(methods[name].entries, shapes)) / total for name in METHODS.values()}
        variants.append(Variant(f"{'+'.join(kinds)} of {len(of)} blocks", shares))
    sizes = {kind: shape[0] * shape[1] for _, kind, shape in matrices}
    gate = 100 * len(selected) * sizes["gate"] / total
    return Shares(total, tuple(variants), sizes["up"], gate, k, rank)
