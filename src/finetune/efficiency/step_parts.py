"""What the folded form's optimizer step is made of: operations and waits, counted, and the time of its parts on a card.

    python -m finetune.efficiency.step_parts --output results/paper/counts.json

counts a step of 24 layers on a CPU, where every operation passes through torch's dispatcher. The parts are measured by
:mod:`finetune.efficiency.card`: each is captured in a CUDA graph and replayed, so that no launch counts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.efficiency.machine import seconds_of
from finetune.efficiency.variants import Build, make_trainee, random_bases, select_variants
from finetune.store import records
from sparsegrad import Basis, SparseGradAdamW, param_groups, sparsegrad_layers, sparsify
from sparsegrad.folded import FoldedLinear
from sparsegrad.select import top_k_of_each

WAITS = {"nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "equal"}
"""Operations whose result decides what comes next: on a device, the host waits for them."""

BLOCKS, WIDTH = 12, 32  # 24 layers, as BERT-base has; what is counted does not depend on their size
REPLAYS = 20


class Counted(TorchDispatchMode):
    """Counts operations by name, and values that are read as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.found[func.overloadpacket._qualified_op_name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Counted:
        self._tolist = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.found["_local_scalar_dense"] += 1
            return self._tolist(tensor)

        cast(Any, Tensor).tolist = tolist  # it passes the dispatcher by
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        cast(Any, Tensor).tolist = self._tolist
        super().__exit__(*error)


def counts(step: int = 3) -> dict[str, int]:
    """Operations and waits of one optimizer step of 24 folded layers: ``operations``, ``waits``."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(BLOCKS))
    )
    U, V = (torch.linalg.qr(torch.randn(n, n)).Q for n in (WIDTH, 4 * WIDTH))
    targets = {"up": r"(?P<layer>\d+)\.0", "down": r"(?P<layer>\d+)\.1"}
    sparsify(model, {"up": Basis(U, V), "down": Basis(V, U)}, WIDTH, targets)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-3, fused=True)
    for _ in range(step):
        model(torch.randn(8, WIDTH)).square().sum().backward()
        with Counted() as counted:
            optimizer.step()
        optimizer.zero_grad()
    return {
        "operations": sum(counted.found.values()),
        "waits": sum(number for name, number in counted.found.items() if name in WAITS),
    }


def step_parts(
    model: Mapping[str, Any], protocol: Mapping[str, Any], *, rows: int, tokens: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of the parts of a folded step under bf16 autocast, and of the passes before it.

    Args:
        model, protocol: configuration groups of an encoder.
        rows, tokens: of the batch.

    Returns:
        ``parts``: ``name`` and ``ms`` of each; ``mode``, ``tokens``, and ``step_ms``, a whole step in graphs.
    """
    bases = random_bases(model, protocol, seed=0, device=device)
    variant = replace(select_variants(["folded"])[0], select_in="step")
    trainee = make_trainee(variant, model, protocol, bases, Build(device, precision="bf16", graphs="auto"))
    passes, optimizer = trainee.steps, cast(SparseGradAdamW, trainee.optimizer)
    vocabulary = int(cast(Any, trainee.model).config.vocab_size)
    ids = torch.randint(5, vocabulary, (rows, tokens), device=device)
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step() -> None:
        passes.backward(batch)
        passes.step()

    for _ in range(8):
        step()
    found = {"a whole step, in graphs": _median(step, device)}
    passes.backward(batch)
    layers = cast(list[FoldedLinear], list(sparsegrad_layers(trainee.model).values()))
    gradients = {layer: cast(Tensor, layer.weight.grad).clone() for layer in layers}
    found["forward and backward, in a graph"] = _median(lambda: passes.backward(batch), device)
    optimizer.zero_grad()
    parts: dict[str, float] = {}
    for kind in bases:
        alike = [layer for layer in layers if layer.kind == kind]
        own = _of_a_kind(alike, [gradients[layer] for layer in alike], optimizer, device)
        parts = {name: parts.get(name, 0.0) + ms for name, ms in own.items()}
    dense = [p for group in optimizer.param_groups if not group["sparsegrad"] for p in group["params"]]
    for parameter in dense:
        parameter.grad = torch.zeros_like(parameter)
    parts["AdamW of all else"] = _replayed(optimizer.step, device)
    whole = found.pop("a whole step, in graphs")
    named = [{"name": name, "ms": ms} for name, ms in (found | parts).items()]
    return {"parts": named, "step_ms": whole, "mode": "bf16, in graphs", "tokens": rows * tokens}


def _of_a_kind(
    layers: list[FoldedLinear], gradients: list[Tensor], optimizer: SparseGradAdamW, device: torch.device
) -> dict[str, float]:
    products, k = layers[0]._products(), layers[0].k
    G = products.rotate(list(gradients))
    places, values, _ = top_k_of_each(G, k)
    weights, nothing = [layer.weight.detach() for layer in layers], torch.zeros_like(values)
    (family,) = [f for f in optimizer._families.values() if layers[0].trained in f.numbers]
    assert family.moments is not None
    moments, keys = family.moments, (places + family.rows(layers)[:, None] * family.entries).flatten()

    def lazy_adam() -> None:
        at, m, v = moments.take(keys)
        moments.put(at, m.lerp(values.flatten(), 0.1), v.lerp(values.flatten() ** 2, 0.001))

    moments.reserve()
    return {
        "rotating the gradients": _replayed(lambda: layers[0]._products().rotate(list(gradients)), device),
        "selecting k entries of each": _replayed(lambda: top_k_of_each(G, k), device),
        "lazy Adam's state": _replayed(lazy_adam, device),
        "folding the update back": _replayed(lambda: layers[0]._products().back(weights, places, nothing), device),
    }


@torch.no_grad()
def _replayed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call that a graph replays; on a CPU, of the call."""
    if device.type != "cuda":
        return _median(call, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return _median(graph.replay, device)


def _median(call: Callable[[], Any], device: torch.device) -> float:
    times = sorted(seconds_of([call] * REPLAYS, device))
    return 1000 * times[len(times) // 2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, and write the two numbers."""
    parser = argparse.ArgumentParser(prog="python -m finetune.efficiency.step_parts", description=__doc__)
    parser.add_argument("--output", required=True, type=Path)
    records.write_json(parser.parse_args(arguments).output, counts())


if __name__ == "__main__":
    main()
