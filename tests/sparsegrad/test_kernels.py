"""Selection by Triton's kernels: against the rule of a CPU, on a card, and here by Triton's interpreter where it is."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from sparsegrad import kernels, top_k
from sparsegrad.select import top_k_of_each


def rows_of(kind, n):
    generator = torch.Generator().manual_seed(n)
    G = torch.randn(3, n, generator=generator)
    if kind == "rounded":  # many ties
        return G.bfloat16().float()
    if kind == "sparse":  # fewer entries than are kept: ties at zero
        return torch.where(torch.rand(3, n, generator=generator) < 0.005, G, 0.0)
    if kind == "constant":
        return torch.full((3, n), -2.5)
    if kind == "wide":  # all magnitudes that float32 has
        return G * torch.logspace(-44, 37, n)
    return G


KINDS = ["normal", "rounded", "sparse", "constant", "wide"]


def check(G, k, **sizes):
    places, values, finite = kernels.radix_top_k(G, k, **sizes)
    assert bool(finite) and places.dtype == torch.int64 and values.dtype == torch.float32
    for row, kept, entries in zip(G.cpu(), places.cpu(), values.cpu(), strict=True):
        expected = top_k(row[None], k)
        assert torch.equal(kept, expected) and torch.equal(entries, row[expected])


def check_small(device):
    for kind in KINDS:
        for n, k in ((1000, 10), (1001, 100), (70, 1), (65, 65)):
            check(rows_of(kind, n).to(device), k, block=64, chunk=32)
    for bad in (float("nan"), float("inf")):
        G = rows_of("normal", 300).to(device)
        G[1, 299] = bad
        assert not bool(kernels.radix_top_k(G, 5, block=64, chunk=32)[2])


def test_kernels_by_the_interpreter_select_as_the_rule():
    if find_spec("triton") is None:
        pytest.skip("needs Triton, which torch's CPU build has not")
    told = os.environ | {"TRITON_INTERPRET": "1"}
    code = "import test_kernels; test_kernels.check_small('cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=os.path.dirname(__file__), env=told, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
def test_kernels_select_as_the_rule():
    check_small("cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_select_as_the_rule_at_full_size(kind):
    check(rows_of(kind, 3072 * 768).cuda(), 23_593)


@pytest.mark.cuda
def test_with_and_without_kernels_the_same_is_selected(monkeypatch):
    G = rows_of("rounded", 60 * 80).cuda().view(3, 60, 80)
    found = top_k_of_each(G, 48)
    monkeypatch.setattr(kernels, "selects", lambda _: False)
    for one, other in zip(found, top_k_of_each(G, 48), strict=True):
        assert torch.equal(one, other)


@pytest.mark.cuda
def test_a_graph_holds_a_selection():
    G = rows_of("normal", 5000).cuda()
    kernels.radix_top_k(G, 50)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        places, values, _ = kernels.radix_top_k(G, 50)
    G.copy_(rows_of("rounded", 5000) * 3)
    graph.replay()
    expected = kernels.radix_top_k(G, 50)
    assert torch.equal(places, expected[0]) and torch.equal(values, expected[1])


def test_other_inputs_are_refused():
    for G, k in ((torch.zeros(2, 3, dtype=torch.float64), 1), (torch.zeros(2, 4)[:, ::2], 1), (torch.zeros(2, 3), 4)):
        with pytest.raises(ValueError, match=r"expected contiguous float32|allowed: 1 <= k <= n"):
            kernels.radix_top_k(G, k)
