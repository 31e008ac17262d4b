"""Selection (D6): exactly k entries, by absolute value, ties to the lowest flat index."""

import hypothesis
import literal
import pytest
import torch
from hypothesis import strategies as st

from sparsegrad import (
    SparseGradAdamW,
    entries_for_density,
    param_groups,
    select,
    sparsegrad_layers,
    sparsify,
    top_k,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_a_literal_sort(seed, dtype):
    """Half of the cases are made of few integers, so that nearly every entry is tied."""
    generator = torch.Generator().manual_seed(seed)
    shape = [(1, 1), (1, 9), (9, 1), (6, 5)][seed % 4]
    G = torch.randn(shape, generator=generator)
    G = (G.round() if seed < 4 else G).to(dtype)
    for k in range(1, G.numel() + 1):
        indices = top_k(G, k)
        assert indices.dtype == torch.int64
        assert indices.tolist() == literal.top_k(G, k).tolist()


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38]) | st.floats(
    width=32, allow_nan=False, allow_infinity=False
)


@hypothesis.given(numbers=st.lists(NUMBERS, min_size=1, max_size=24), data=st.data())
def test_any_finite_matrix_and_k_equal_a_literal_sort(numbers, data):
    """Few values, so that ties abound, and all sizes that float32 has."""
    G = torch.tensor(numbers).view(data.draw(st.sampled_from([1, len(numbers)])), -1)
    k = data.draw(st.integers(1, G.numel()))
    assert top_k(G, k).tolist() == literal.top_k(G, k).tolist()


@hypothesis.given(k=st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3)))
def test_any_k_selects_so_many_or_is_refused(k):
    if type(k) is int and 1 <= k <= 12:
        assert len(top_k(torch.randn(3, 4), k)) == k
    else:
        with pytest.raises(ValueError, match=r"^k=.*; a matrix of shape \(3, 4\) allows whole numbers from 1 to 12"):
            top_k(torch.randn(3, 4), k)


@hypothesis.given(st.lists(st.integers(0, 40), unique=True), st.lists(st.integers(0, 40), unique=True))
def test_any_two_sets_of_indices_are_united_in_order(old, new):
    old, new = torch.tensor(sorted(old), dtype=torch.int64), torch.tensor(sorted(new), dtype=torch.int64)
    union, place_old, place_new = select.insert_sorted(old, new)
    assert union.tolist() == sorted({*old.tolist(), *new.tolist()})
    assert torch.equal(union[place_old], old) and torch.equal(union[place_new], new)


def test_keeps_exactly_k_of_an_all_negative_gradient():
    """The control is the rule of some of the released files: the k-th largest *signed* value as threshold."""
    G = -torch.rand(20, 10) - 0.1
    assert len(top_k(G, 7)) == 7
    assert set(top_k(G, 7).tolist()) == set(G.flatten().argsort()[:7].tolist())
    signed_threshold = G.flatten().topk(7).values[-1]
    assert (G.abs() >= signed_threshold).sum() == G.numel()


def test_the_gradient_is_only_read():
    G = torch.randn(5, 5, requires_grad=True)
    before = G.detach().clone()
    assert not top_k(G, 3).requires_grad
    assert torch.equal(G.detach(), before)


@pytest.mark.parametrize("k", [0, -1, 13, 1.0, 2.5, True, None, "3"])
def test_refuses_a_bad_k_and_names_the_limit(k):
    with pytest.raises(ValueError, match=r"k=.*; a matrix of shape \(3, 4\) allows whole numbers from 1 to 12"):
        top_k(torch.randn(3, 4), k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("place", [0, 11])
def test_refuses_a_gradient_that_is_not_finite(bad, k, place):
    G = torch.randn(3, 4)
    G.view(-1)[place] = bad
    with pytest.raises(ValueError, match="gradient holds non-finite values: lower the learning rate or check the loss"):
        top_k(G, k)


@pytest.mark.parametrize(
    ("density", "shape", "k"),
    [
        (1, (3, 4), 12),
        (0.5, (3, 4), 6),
        (1e-9, (3, 4), 1),
        (0.01187, (3072, 768), 28005),
        (0.002, (11008, 4096), 90178),
    ],
)
def test_entries_for_density(density, shape, k):
    assert entries_for_density(density, shape) == k


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), True, "0.1", None])
def test_refuses_a_density_that_is_no_share(density):
    with pytest.raises(ValueError, match=rf"density={density}; allowed: above 0, at most 1"):
        entries_for_density(density, (3, 4))


# A bound guessed from a sample


def matrices():
    generator = torch.Generator().manual_seed(3)
    G = torch.randn(122, 200, generator=generator)
    yield "even", G
    yield "few large columns", G * torch.logspace(0, -4, 200)
    yield "few large rows", G * torch.logspace(0, -4, 122)[:, None]
    yield "ties", (3 * G).round()
    yield "zeros", torch.zeros_like(G)
    yield "transposed", G.T
    yield "one row alone", torch.zeros_like(G).index_copy_(0, torch.tensor([7]), G[:1])
    width_of_the_stride = torch.randn(300, 61, generator=generator)
    yield "as wide as the sample's stride", width_of_the_stride * torch.logspace(0, -3, 61)


@pytest.mark.parametrize(("name", "G"), list(matrices()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("k", [1, 150, 244, 2000])
def test_a_sample_changes_nothing_of_the_selection(name, G, k):
    assert torch.equal(top_k(G, k), literal.top_k(G, k))


def test_the_sample_leaves_few_candidates_and_a_bad_guess_is_not_used():
    G = torch.randn(300, 200, generator=torch.Generator().manual_seed(3))
    magnitude = G.abs().view(1, -1)
    assert 600 <= (magnitude >= select._bound(magnitude, 600, 200)).sum() <= magnitude.numel() // 10
    bad = torch.zeros(60_000)
    bad[::61] = 1.0  # what the sample sees is no sample of the rest
    assert (bad >= select._bound(bad.view(1, -1), 1200, 200)).sum() < 1200
    assert torch.equal(top_k(bad.view(300, 200), 1200), literal.top_k(bad.view(300, 200), 1200))


# ---- another rule ----


class RandomEntries:
    """k entries drawn by a generator, as a second rule; it keeps what it gave."""

    def __init__(self, seed=0):
        self.generator, self.kept = torch.Generator().manual_seed(seed), []

    def __call__(self, G, k):
        self.kept.append(torch.randperm(G.numel(), generator=self.generator)[:k].sort().values)
        return self.kept[-1]


ROUTES = [
    ({"form": "folded"}, 5),
    ({"form": "folded", "select_in": "backward"}, 5),
    ({"form": "rotated"}, 5),
    ({"form": "rotated", "select_in": "backward"}, 5),
    ({"form": "truncated", "keep": 3}, 3),
]


@pytest.mark.parametrize(
    ("options", "k"), ROUTES, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else ""
)
def test_the_entries_that_move_are_those_of_the_rule(options, k, blocks, block_bases, block_patterns):
    rule, bases = RandomEntries(), block_bases()
    model = sparsify(blocks(), bases, 5, block_patterns, select=rule, **options)
    layers = list(sparsegrad_layers(model).values())
    before = [layer.rotated_weight().clone() for layer in layers]
    optimizer = SparseGradAdamW(param_groups(model), lr=0.1)
    model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert len(rule.kept) == len(layers)
    asked = [tuple(kept.tolist()) for kept in rule.kept]
    for layer, start in zip(layers, before, strict=True):
        moved = ((layer.rotated_weight() - start).abs() > 1e-6).flatten().nonzero().flatten()
        asked.remove(tuple(moved.tolist()))
        assert len(moved) == k and torch.equal(optimizer.touched(layer), moved)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([0, 1], r"torch.int64 \(2,\)"),
        ([0.0, 1.0, 2.0], r"torch.float32 \(3,\)"),
        ([[0, 1, 2]], r"torch.int64 \(1, 3\)"),
        (None, "NoneType"),
        ([-1, 0, 1], "indices from -1 to 1"),
        ([0, 1, 12], "indices from 0 to 12"),
        ([0, 2, 1], "indices from 0 to 2, or in another order"),
        ([0, 1, 1], "indices from 0 to 1, or in another order"),
    ],
)
def test_a_rule_that_gives_something_else_is_refused(given, what):
    def rule(G, k):
        return None if given is None else torch.tensor(given)

    with pytest.raises(ValueError, match=rf"select=rule gave {what}.*a rule gives 3 flat indices, int64 .* 0 to 11\."):
        select.selected(torch.randn(1, 3, 4), 3, rule)


def test_no_rule_is_asked_about_a_gradient_that_is_not_finite():
    rule = RandomEntries()
    G = torch.stack((torch.full((3, 4), torch.inf), torch.ones(3, 4)))
    assert select.selected(G, 3, rule)[2].tolist() == [False, True]
    assert len(rule.kept) == 1
