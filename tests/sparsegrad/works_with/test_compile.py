"""torch.compile: whole models in one graph; what selects in its backward pass breaks it there, and agrees."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sparsegrad import SparseGradAdamW, param_groups, sparsify

ONE_GRAPH = [
    {"form": "folded"},
    {"form": "rotated"},
    {"form": "truncated", "update": "in_place"},
    {"form": "truncated", "update": "side"},
]
BREAKS = [{"form": form, "select_in": "backward"} for form in ("folded", "rotated")]


@pytest.fixture(autouse=True)
def _graphs_of_this_test_alone():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("options", [*ONE_GRAPH, *BREAKS], ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)  # torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # likewise
def test_a_compiled_model_takes_the_steps_of_an_eager_one(options, blocks, block_bases, block_patterns):
    """With a backend that needs no C++ compiler; the optimizer is not compiled."""
    results = []
    for compiled in (False, True):
        model = sparsify(blocks(n=1), block_bases(), 9, block_patterns, **options)
        optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
        call = torch.compile(model, backend="aot_eager", fullgraph=options in ONE_GRAPH) if compiled else model
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            call(x).square().sum().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=0, atol=1e-12)
    assert bool(counters["graph_break"]) == (options in BREAKS)
    assert counters["stats"]["unique_graphs"] == 1 or options in BREAKS


def test_a_model_compiled_in_place_is_found_and_merged(blocks, block_bases, block_patterns):
    """``model.compile()`` leaves names and layers as they are."""
    model = sparsify(blocks(n=1), block_bases(), 9, block_patterns)
    names = list(model.state_dict())
    model.compile(backend="eager")
    assert list(model.state_dict()) == names
    assert len(param_groups(model)) == 2 and isinstance(model, nn.Module)
