"""Bases and adapters on disk: what comes back, what is refused, and that no half-written file is left."""

import json
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from literal import assert_unchanged, snapshot
from safetensors import safe_open
from safetensors.torch import save_file

from sparsegrad import (
    Basis,
    load_adapter,
    load_bases,
    load_tensors,
    save_adapter,
    save_bases,
    save_tensors,
)

# ---- bases ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bases_and_metadata_come_back(dtype, block_bases, tmp_path):
    bases, metadata = block_bases(dtype=dtype), {"model": "bert", "gradients": 360, "hash": {"data": "abc"}}
    save_bases(tmp_path / "new" / "folder" / "bases.safetensors", bases, metadata)
    loaded, loaded_metadata = load_bases(tmp_path / "new" / "folder" / "bases.safetensors")
    assert set(loaded) == {"up", "down"} and loaded_metadata.items() >= metadata.items()
    for kind in bases:
        assert torch.equal(loaded[kind].U, bases[kind].U) and torch.equal(loaded[kind].V, bases[kind].V)
        assert loaded[kind].U.dtype == dtype


def test_kinds_may_share_a_basis_and_orientations_a_factor(random_basis, tmp_path):
    basis = random_basis(6, 4)
    save_bases(tmp_path / "b", {"gate": basis, "up": basis, "released": basis.oriented("released")})
    loaded, _ = load_bases(tmp_path / "b")
    assert torch.equal(loaded["gate"].U, loaded["up"].U) and torch.equal(loaded["released"].U, basis.U.T)


def test_the_file_is_plain_safetensors_with_json_metadata(block_bases, tmp_path):
    """Anyone can read it without this library, and nothing in it is pickled."""
    save_bases(tmp_path / "b", block_bases(), {"seed": 3})
    with safe_open(tmp_path / "b", framework="pt") as file:
        assert set(file.keys()) == {"up.U", "up.V", "down.U", "down.V"}
        assert json.loads(file.metadata()["sparsegrad"]) == {"content": "bases", "seed": 3}


def test_a_basis_that_is_not_orthonormal_is_refused_on_loading(block_bases, tmp_path):
    bases = block_bases()
    bases["down"].U[0] *= 1.01
    save_bases(tmp_path / "b", bases)
    with pytest.raises(
        ValueError, match=r"no basis of kind 'down' \(the basis is off orthogonality by .*e-02: .* run the basis"
    ):
        load_bases(tmp_path / "b")


def test_a_kind_with_a_dot_is_refused(random_basis, tmp_path):
    with pytest.raises(ValueError, match=r"layer kinds \['mlp.up'\]: a kind may not contain a dot"):
        save_bases(tmp_path / "b", {"mlp.up": random_basis(4, 3)})
    assert not list(tmp_path.iterdir())


# ---- files that are no such files ----


@pytest.mark.parametrize("loader", [load_tensors, load_bases, lambda path: load_adapter(path, torch.nn.Linear(2, 2))])
class TestEveryLoader:
    def test_refuses_a_missing_file(self, loader, tmp_path):
        with pytest.raises(ValueError, match="nowhere.safetensors does not exist: run the stage that writes it"):
            loader(tmp_path / "nowhere.safetensors")
        with pytest.raises(ValueError, match="does not exist"):
            loader(tmp_path)  # a folder is no file

    @pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, 300, -1])
    def test_refuses_a_truncated_file(self, loader, keep, block_bases, tmp_path):
        save_bases(tmp_path / "b", block_bases())
        blob = (tmp_path / "b").read_bytes()
        assert len(blob) > 300
        (tmp_path / "b").write_bytes(blob[:keep])
        with pytest.raises(
            ValueError, match=r"b is damaged, or no safetensors file \(.*\): run the stage that writes it"
        ):
            loader(tmp_path / "b")

    def test_finds_every_changed_byte(self, loader, block_bases, tmp_path):
        save_bases(tmp_path / "b", block_bases(), {"seed": 3})
        blob = (tmp_path / "b").read_bytes()
        header = 8 + int.from_bytes(blob[:8], "little")
        for place in (*range(0, header, 7), *range(header, len(blob), 97), len(blob) - 1):
            if blob[place : place + 1].isspace():
                continue  # between JSON's words, a space is as good as a tab
            changed = bytearray(blob)
            changed[place] ^= 1
            (tmp_path / "b").write_bytes(changed)
            with pytest.raises(ValueError, match=r"b (is damaged|is a safetensors file of another program)"):
                loader(tmp_path / "b")

    def test_refuses_a_file_without_a_checksum(self, loader, tmp_path):
        save_file({"up.U": torch.eye(2), "up.V": torch.eye(2)}, tmp_path / "b", {"sparsegrad": '{"content": "bases"}'})
        with pytest.raises(
            ValueError, match=r"of an older version \(it has no checksum\): run the stage that writes it"
        ):
            loader(tmp_path / "b")

    def test_refuses_a_pickle_and_does_not_run_it(self, loader, tmp_path):
        torch.save({"up.U": torch.eye(2)}, tmp_path / "b")
        with pytest.raises(ValueError, match="is damaged"):
            loader(tmp_path / "b")

    def test_refuses_a_safetensors_file_of_another_program(self, loader, tmp_path):
        for metadata in (None, {"format": "pt"}):
            save_file({"up.U": torch.eye(2), "up.V": torch.eye(2)}, tmp_path / "b", metadata)
            with pytest.raises(ValueError, match="b is a safetensors file of another program: it has no 'sparsegrad'"):
                loader(tmp_path / "b")


def test_bases_and_adapters_are_not_taken_for_each_other(trained, block_bases, tmp_path):
    model, _, _ = trained()
    save_bases(tmp_path / "bases", block_bases())
    save_adapter(tmp_path / "adapter", model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="bases holds 'bases', not an adapter"):
        load_adapter(tmp_path / "bases", model)
    with pytest.raises(ValueError, match="adapter holds 'adapter', not bases"):
        load_bases(tmp_path / "adapter")
    assert_unchanged(model, before)


# ---- anything ----


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FLOATS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
TENSORS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3))


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    described=st.dictionaries(st.text(min_size=1, max_size=8), TENSORS, max_size=4),
    metadata=st.dictionaries(st.text(max_size=8), JSON, max_size=3),
)
def test_any_tensors_and_json_come_back(described, metadata, tmp_path):
    tensors = {name: (3 * torch.randn(shape)).to(dtype) for name, (dtype, shape) in described.items()}
    save_tensors(tmp_path / "t", tensors, metadata)
    loaded, found = load_tensors(tmp_path / "t")
    assert found == metadata and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_tensors_that_share_memory_are_written_one_by_one(random_basis, tmp_path):
    """Two bases with one U, views of one another, a tensor under two names."""
    basis, x = random_basis(6, 4), torch.randn(4, 4)
    save_bases(tmp_path / "b", {"up": basis, "gate": Basis(basis.U, basis.V.flip(0))})
    loaded, _ = load_bases(tmp_path / "b")
    assert torch.equal(loaded["up"].U, loaded["gate"].U) and torch.equal(loaded["gate"].V, basis.V.flip(0))
    save_tensors(tmp_path / "t", {"x": x, "again": x, "row": x[1], "turned": x.T}, {})
    tensors, _ = load_tensors(tmp_path / "t")
    assert (
        torch.equal(tensors["again"], x) and torch.equal(tensors["row"], x[1]) and torch.equal(tensors["turned"], x.T)
    )


# ---- whole or not at all ----


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(step, error, tmp_path, monkeypatch):
    save_tensors(tmp_path / "t", {"a": torch.ones(3)}, {"version": 1})

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        save_tensors(tmp_path / "t", {"a": torch.zeros(3)}, {"version": 2})
    with pytest.raises(type(error)):
        save_tensors(tmp_path / "other", {"a": torch.zeros(3)}, {"version": 2})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    tensors, metadata = load_tensors(tmp_path / "t")
    assert torch.equal(tensors["a"], torch.ones(3)) and metadata == {"version": 1}


def test_metadata_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_tensors(tmp_path / "t", {"a": torch.ones(3)}, {"bad": object()})
    assert not list(tmp_path.iterdir())
