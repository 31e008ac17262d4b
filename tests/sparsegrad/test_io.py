"""Bases and adapters on disk: what comes back, what is refused, and that no half-written file is left."""

import json
import os

import pytest
import torch
from literal import assert_unchanged, snapshot
from safetensors import safe_open
from safetensors.torch import save_file

from sparsegrad import (
    SparseGradAdamW,
    find_targets,
    load_adapter,
    load_bases,
    load_tensors,
    merge,
    param_groups,
    save_adapter,
    save_bases,
    save_tensors,
    sparsegrad_layers,
    sparsify,
)

FORMS = ["folded", "rotated", "truncated"]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture
def trained(tiny_transformer, transformer_bases):
    """``trained(family, form, **options)``: a model after some steps, its optimizer and its sparsify options."""

    def make(family="bert", form="folded", basis="full", dense=True, dtype=torch.float64, steps=3):
        model, patterns, tokens = tiny_transformer(family, dtype=dtype)
        full = transformer_bases()
        bases = {"full": full, "leading": {kind: b.leading(6, 5) for kind, b in full.items()}, "none": None}[basis]
        if not dense:
            model.requires_grad_(False)
            for target in find_targets(model, patterns):
                target.module.weight.requires_grad_(True)
        config = {"k": {"up": 7, "down": 9}, "target_modules": patterns, "form": form}
        if family == "llama":
            config["layers_to_transform"] = [0, 3]
        sparsify(model, bases, **config)
        optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.log_softmax(model(input_ids=tokens).logits.float(), -1)[..., 0].square().sum().backward()
            optimizer.step()
        return model, optimizer, config

    return make


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
    model, optimizer, config = trained()
    save_bases(tmp_path / "bases", block_bases())
    save_adapter(tmp_path / "adapter", model, optimizer, config)
    before = snapshot(model)
    with pytest.raises(ValueError, match="bases holds 'bases', not an adapter"):
        load_adapter(tmp_path / "bases", model)
    with pytest.raises(ValueError, match="adapter holds 'adapter', not bases"):
        load_bases(tmp_path / "adapter")
    assert_unchanged(model, before)


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


# ---- adapters ----


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize(
    ("form", "basis"),
    [*((form, "full") for form in FORMS), ("folded", "none"), ("rotated", "none"), ("folded", "leading")],
)
def test_base_model_plus_adapter_is_the_trained_model(family, form, basis, trained, tiny_transformer, tmp_path):
    model, optimizer, config = trained(family, form, basis)
    save_adapter(tmp_path / "adapter.safetensors", model, optimizer, config)
    base, _, tokens = tiny_transformer(family)
    assert (logits(base, tokens) - logits(model, tokens)).abs().max() > 1e-3
    assert load_adapter(tmp_path / "adapter.safetensors", base) is base
    torch.testing.assert_close(logits(base, tokens), logits(model, tokens), rtol=0, atol=1e-10)
    assert list(sparsegrad_layers(base)) == list(sparsegrad_layers(model))
    assert all((layer.basis is None) == (basis == "none") for layer in sparsegrad_layers(base).values())
    torch.testing.assert_close(logits(merge(base), tokens), logits(model, tokens), rtol=0, atol=1e-10)


def test_an_adapter_holds_the_touched_entries_and_not_the_matrices(trained, tmp_path):
    model, optimizer, config = trained()
    save_adapter(tmp_path / "a", model, optimizer, config)
    tensors, metadata = load_tensors(tmp_path / "a")
    layers = sparsegrad_layers(model)
    for name, layer in layers.items():
        indices = tensors[f"indices.{name}"]
        assert torch.equal(indices, optimizer.touched(layer))
        assert layer.k <= len(indices) <= 3 * layer.k and len(tensors[f"values.{name}"]) == len(indices)
    dense = {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in layers}
    assert {name.removeprefix("dense.") for name in tensors if name.startswith("dense.")} == dense
    assert sum(name.endswith((".U", ".V")) for name in tensors) == 4  # one basis a kind, not one a layer
    assert metadata["sparsify"] == config


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [0, 3])
def test_an_adapter_of_mlp_weights_alone_has_no_dense_part(form, steps, trained, tiny_transformer, tmp_path):
    model, optimizer, config = trained(form=form, dense=False, steps=steps)
    save_adapter(tmp_path / "a", model, optimizer, config)
    assert not [name for name in load_tensors(tmp_path / "a")[0] if name.startswith("dense.")]
    base, _, tokens = tiny_transformer("bert")
    load_adapter(tmp_path / "a", base)
    torch.testing.assert_close(logits(base, tokens), logits(model, tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_bfloat16_adapter_brings_back_the_masters(form, trained, tiny_transformer, tmp_path):
    model, optimizer, config = trained(form=form, dtype=torch.bfloat16)
    save_adapter(tmp_path / "a", model, optimizer, config)
    base, _, _ = tiny_transformer("bert", dtype=torch.bfloat16)
    start = {t.name: t.module.weight.detach().float() for t in find_targets(base, config["target_modules"])}
    load_adapter(tmp_path / "a", base)
    loaded = sparsegrad_layers(base)
    for name, layer in sparsegrad_layers(model).items():
        change = layer.original_weight() - start[name]
        assert change.abs().max() > 1e-3
        error = loaded[name].original_weight() - layer.original_weight()
        assert error.norm() < 1e-4 * change.norm()
        assert loaded[name].weight.dtype == torch.bfloat16


OTHERS = [
    ("bert", {"hidden_size": 32}),
    ("bert", {"intermediate_size": 32}),
    ("bert", {"num_hidden_layers": 1}),
    ("bert", {"num_hidden_layers": 3}),
    ("roberta", {}),
    ("llama", {}),
]


@pytest.mark.parametrize(
    ("family", "sizes", "dense"),
    [(*other, dense) for other in OTHERS for dense in (True, False)] + [("bert", {"vocab_size": 60}, True)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("basis", ["full", "none"])
def test_an_adapter_of_another_architecture_is_refused_and_the_model_left_unchanged(
    family, sizes, dense, basis, trained, tiny_transformer, tmp_path
):
    """An adapter without a dense part carries only the MLPs' names and shapes to tell by."""
    model, optimizer, config = trained(dense=dense, basis=basis)
    save_adapter(tmp_path / "a", model, optimizer, config)
    other, _, _ = tiny_transformer(family, **sizes)
    before = snapshot(other)
    with pytest.raises(ValueError, match="is an adapter of another architecture|matches no module in full"):
        load_adapter(tmp_path / "a", other)
    assert_unchanged(other, before)
