"""What names matrices: a dictionary, a list of endings, one expression, a word; and what these are resolved to."""

import pytest
import torch
from torch import nn

from sparsegrad import find_targets, resolve_targets, sparsify

UP, DOWN = r"layers\.(?P<layer>\d+)\.up", r"layers\.(?P<layer>\d+)\.down"


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({"a": "b"}, {"a": "b"}),
        (["up"], {"up": UP}),
        (("up", "down"), {"up": UP, "down": DOWN}),
        (r"layers\.\d+\.(up|down)", {"up": UP, "down": DOWN}),
        (["layers.0.up", "layers.2.up", "head"], {"up": r"layers\.(?P<layer>0|2)\.up", "head": "head"}),
        (r".*", {"up": UP, "down": DOWN, "head": "head"}),
    ],
)
def test_endings_and_expressions_are_resolved_to_kinds_and_expressions(given, resolved, blocks):
    model = blocks(n=3)
    assert resolve_targets(model, given) == resolved
    if given != {"a": "b"}:
        found = find_targets(model, given)
        assert found == find_targets(model, resolved)
        assert {t.kind for t in found} == set(resolved)


def test_an_ending_ends_at_a_dot(blocks):
    model = blocks(n=1)
    model.setup = nn.Linear(2, 2)
    assert [t.name for t in find_targets(model, ["up"])] == ["layers.0.up"]


def test_two_stacks_of_blocks_share_a_kind(blocks):
    model = nn.ModuleDict({"encoder": blocks(n=2), "decoder": blocks(n=1)})
    patterns = resolve_targets(model, ["up"])
    assert patterns == {"up": r"(?:encoder\.layers\.|decoder\.layers\.)(?P<layer>\d+)\.up"}
    found = [(t.name, t.layer) for t in find_targets(model, ["up"], [0])]
    assert found == [("encoder.layers.0.up", 0), ("decoder.layers.0.up", 0)]


def test_what_follows_the_block_names_the_kind():
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 6))}) for _ in "ab")})
    assert resolve_targets(model, "h.*") == {"mlp_0": r"h\.(?P<layer>\d+)\.mlp\.0"}
    assert resolve_targets(nn.Sequential(nn.Linear(4, 6)), ["0"]) == {"0": "0"}


def test_one_kind_has_one_shape(blocks):
    model = blocks(n=2)
    model.layers[1].up = nn.Linear(8, 10)
    with pytest.raises(ValueError, match=r"several shapes in one .*: up \[\(10, 8\), \(12, 8\)\]. Give a dictionary"):
        find_targets(model, ["up"])


def test_blocks_that_differ_need_a_dictionary(blocks):
    model = nn.ModuleDict({"encoder": blocks(n=2), "decoder": blocks(n=2)})
    with pytest.raises(ValueError, match=r"differ from block to block \(decoder.layers.0.up, encoder.layers.1.up\)"):
        find_targets(model, ["encoder.layers.0.up", "decoder.layers.1.up"])


def test_a_sparsified_model_is_described_in_the_same_words(blocks, block_bases, block_patterns):
    model = blocks()
    resolved = resolve_targets(model, ["up", "down"])
    names = [t.name for t in find_targets(model, resolved)]
    sparsify(model, block_bases(), 5, ["up", "down"])
    assert resolve_targets(model, ["up", "down"]) == resolved
    assert [t.name for t in find_targets(model, resolved)] == names
    assert {t.shape for t in find_targets(model, resolved)} == {(12, 8), (8, 12)}


def test_a_layer_that_computes_with_more_than_its_weight_is_refused(blocks, block_bases):
    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return super().forward(x) * self.scale

    model = blocks(n=1)
    model.layers[0].up = Scaled(8, 12)
    with pytest.raises(ValueError, match=r"layers.0.up: Scaled computes with scale besides its weight and bias"):
        sparsify(model, block_bases(), 5, ["up"])
