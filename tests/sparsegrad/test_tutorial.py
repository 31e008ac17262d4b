"""The blocks of docs/tutorial.md run in order, and do what the text says."""

import re
from pathlib import Path

import pytest
import torch

from sparsegrad import TruncatedLinear, sparsegrad_layers

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The names after all blocks."""
    names = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(tmp_path_factory.mktemp("tutorial"))
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_it_needs_torch_alone():
    imported = re.findall(r"^(?:from|import) (\w+)", "\n".join(BLOCKS), re.M)
    assert set(imported) == {"copy", "sparsegrad", "torch"} and len(BLOCKS) > 5


def test_rotated_gradients_lie_in_fewer_entries(found):
    plain, rotated = found["shares"]
    assert rotated > 0.9 > 0.6 > plain


def test_training_learns_the_new_function_and_the_adapter_holds_it(found):
    assert found["end"] < found["start"] / 100
    assert not sparsegrad_layers(found["plain"])
    loss = found["loss_of"](found["plain"], found["test"]).item()
    assert loss == pytest.approx(found["end"], rel=1e-3)
    before = found["loss_of"](found["base"], found["test"]).item()
    assert before == found["start"]  # the copy that the adapter was put on


def test_training_goes_on_in_new_bases(found):
    layers = sparsegrad_layers(found["model"])
    assert layers and all(isinstance(layer, TruncatedLinear) for layer in layers.values())
    assert found["refreshed"] < found["start"] / 10
