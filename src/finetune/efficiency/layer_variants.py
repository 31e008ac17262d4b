"""One MLP, ``up``, GELU, ``down``, trained by every method and form, and the operations that a step needs by formula.

Operations of one matrix ``(o, i)`` and N tokens: ``4 N o i`` for forward and the input's gradient, which the floor has
too, and what the method says (:meth:`finetune.methods.base.Method.operations`). Element-wise work, Adam and the search
for the top k are in none; a sparse first product of folding back (on a CPU) counts as the dense one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.efficiency.variants import PRECISIONS, Trainee
from finetune.methods import Method, build_method
from sparsegrad import Basis, sparsegrad_layers

FLOOR = "floor"
FORMS = {"rotated_regular": "rotated", "folded": "folded", "truncated": "truncated", "truncated_input": "truncated"}
LAYER_VARIANTS = (FLOOR, "full", "lora", *FORMS)
"""``floor`` is the frozen MLP: what any method pays for the passes through it."""


@dataclass(frozen=True)
class Point:
    """What is measured at once.

    Attributes:
        hidden: in_features of ``up``; ``down`` has them as out_features.
        inner: width between.
        tokens: N, rows of the input.
        density: k over the entries of a matrix; LoRA's rank is the nearest of the same number of trained numbers.
        decay: 0: inputs and output gradients of equal energy in all directions, so that the k entries lie anywhere.
            Above: coordinate j in the bases falls as ``j ** -decay``, so that they lie in the leading rows and columns.
    """

    hidden: int
    inner: int
    tokens: int
    density: float
    decay: float = 0.0

    @property
    def k(self) -> int:
        """Entries kept in each of the two matrices."""
        return max(1, round(self.density * self.hidden * self.inner))

    @property
    def lora_rank(self) -> int:
        return max(1, round(self.k / (self.hidden + self.inner)))


class MLP(nn.Module):
    """``down(gelu(up(x)))``."""

    base_model_prefix = "mlp"  # read by finetune.methods.base.Targets

    def __init__(self, hidden: int, inner: int, device: torch.device) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner, device=device)
        self.down = nn.Linear(inner, hidden, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """``(tokens, hidden) -> (tokens, hidden)``."""
        return self.down(nn.functional.gelu(self.up(x)))


def make_bases(point: Point, seed: int, device: torch.device) -> dict[str, Basis]:
    """Random orthogonal bases of both kinds, float32."""
    generator = torch.Generator().manual_seed(seed)
    of = {}
    for size in dict.fromkeys((point.hidden, point.inner)):
        of[size] = torch.linalg.qr(torch.randn(size, size, generator=generator).to(device)).Q.contiguous()
    return {"up": Basis(of[point.hidden], of[point.inner]), "down": Basis(of[point.inner], of[point.hidden])}


def make_layer(
    name: str, point: Point, bases: Mapping[str, Basis], *, seed: int, learning_rate: float = 1e-5
) -> Trainee:
    """Build the MLP with random weights and hand it to a variant's method, which trains matrices and biases."""
    torch.manual_seed(seed)
    plain = MLP(point.hidden, point.inner, bases["up"].U.device)
    if name == FLOOR:
        return Trainee(plain.requires_grad_(False), None)
    method = _method(name, point, bases, bases["up"].U.device)
    model = method.prepare(plain).train()
    return Trainee(model, method.optimizer(model, learning_rate, 0.0))


def _method(name: str, point: Point, bases: Mapping[str, Basis], device: torch.device) -> Method:
    base = "sparsegrad" if name in FORMS else name
    settings = {"name": base, "form": FORMS.get(name, ""), "matmul": "regular"}
    settings["core"] = "input" if name == "truncated_input" else "square"
    modules = {"name": "mlp", "target_modules": {"up": "up", "down": "down"}, "layers_to_transform": None}
    modules |= {"lora_rank": point.lora_rank, "k": point.k}
    choices = {"density": None, "orientation": "hosvd", "train": "targets", "frozen": {}, "lora_scale": 2}
    return build_method(settings, modules, choices, bases=bases, one_backward_a_step=True, device=device.type)


def make_batch(point: Point, bases: Mapping[str, Basis], seed: int) -> dict[str, Tensor]:
    """Input and output gradient, ``(tokens, hidden)`` each; the input asks for its gradient, as inside a network."""
    device = bases["up"].U.device
    generator = torch.Generator(device).manual_seed(seed)
    x, g = (torch.randn(point.tokens, point.hidden, generator=generator, device=device) for _ in range(2))
    if point.decay:
        scale = torch.arange(1, point.hidden + 1, device=device) ** -point.decay
        x, g = (x * scale) @ bases["up"].U, (g * scale) @ bases["down"].V
    return {"x": x.requires_grad_(), "g": g}


def layer_step(trainee: Trainee, batch: Mapping[str, Tensor], precision: str) -> None:
    """Forward, backward down to the input, update."""
    x, dtype = batch["x"], PRECISIONS[precision]
    x.grad = None
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        y = trainee.model(x)
    y.backward(batch["g"].to(y.dtype))
    if trainee.optimizer is not None:
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()


def variants_at(point: Point) -> list[str]:
    """Those of :data:`LAYER_VARIANTS` that the point allows: a core of all outputs has an entry a row at least."""
    fits = point.k >= max(point.inner, point.hidden)
    return [name for name in LAYER_VARIANTS if fits or name != "truncated_input"]


def touched(trainee: Trainee) -> dict[str, list[int]]:
    """Rows and columns of each matrix that hold an entry moved so far, by layer kind; empty for dense methods."""
    found = {}
    for name, layer in sparsegrad_layers(trainee.model).items():
        if layer.selects:
            indices, width = trainee.optimizer.touched(layer), layer.in_features
            found[name] = [len(torch.unique(indices // width)), len(torch.unique(indices % width))]
    return found


def step_flop(name: str, point: Point, device: torch.device) -> float:
    """Floating-point operations of a step on a device, both matrices, by the formulas above."""
    shapes, N = {"up": (point.inner, point.hidden), "down": (point.hidden, point.inner)}, point.tokens
    total = sum(4.0 * N * o * i for o, i in shapes.values())
    if name == FLOOR:
        return total
    method = _method(name, point, {}, device)
    for o, i in shapes.values():
        own = method.operations((o, i))
        total += N * own.token + own.step + sum(min(N * a, b) for a, b in own.choices)
    return total
