"""Adapters: what comes back whoever changed the model, what is refused, and that a base is known by its bits."""

import copy
import itertools
import json
import pickle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from literal import assert_unchanged, snapshot, train
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sparsegrad import (
    AdapterState,
    SparseGradAdamW,
    adapter_state,
    clip_grad_norm_,
    find_targets,
    load_adapter,
    load_tensors,
    merge,
    param_groups,
    put_adapter,
    refresh,
    save_adapter,
    save_bases,
    save_tensors,
    sparsegrad_layers,
    sparsify,
)
from sparsegrad.changes import rotated_at
from sparsegrad.gaps import from_gaps, to_gaps

FORMS = ["folded", "rotated", "truncated"]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize(
    ("form", "basis"),
    [*((form, "full") for form in FORMS), ("folded", "none"), ("rotated", "none"), ("folded", "leading")],
)
def test_base_model_plus_adapter_is_the_trained_model(family, form, basis, trained, tiny_transformer, tmp_path):
    model, _, _ = trained(family, form, basis)
    save_adapter(tmp_path / "adapter.safetensors", model)
    base, _, tokens = tiny_transformer(family)
    assert (logits(base, tokens) - logits(model, tokens)).abs().max() > 1e-3
    assert load_adapter(tmp_path / "adapter.safetensors", base) is base
    torch.testing.assert_close(logits(base, tokens), logits(model, tokens), rtol=0, atol=1e-10)
    assert list(sparsegrad_layers(base)) == list(sparsegrad_layers(model))
    assert all((layer.basis is None) == (basis == "none") for layer in sparsegrad_layers(base).values())
    torch.testing.assert_close(logits(merge(base), tokens), logits(model, tokens), rtol=0, atol=1e-10)


def test_an_adapter_holds_the_touched_entries_and_not_the_matrices(trained, tmp_path):
    model, optimizer, config = trained()
    save_adapter(tmp_path / "a", model)
    tensors, metadata = load_tensors(tmp_path / "a")
    layers = sparsegrad_layers(model)
    for name, layer in layers.items():
        indices = from_gaps(tensors[f"gaps.{name}"])
        assert torch.equal(indices, optimizer.touched(layer))
        assert layer.k <= len(indices) <= 3 * layer.k and len(tensors[f"values.{name}"]) == len(indices)
    dense = {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in layers}
    assert {name.removeprefix("dense.") for name in tensors if name.startswith("dense.")} == dense
    assert sum(name.endswith((".U", ".V")) for name in tensors) == 4  # one basis a kind, not one a layer
    assert metadata["arguments"].items() >= config.items()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [0, 3])
def test_an_adapter_of_mlp_weights_alone_has_no_dense_part(form, steps, trained, tiny_transformer, tmp_path):
    model, _, _ = trained(form=form, dense=False, steps=steps)
    save_adapter(tmp_path / "a", model)
    assert not [name for name in load_tensors(tmp_path / "a")[0] if name.startswith("dense.")]
    base, _, tokens = tiny_transformer("bert")
    load_adapter(tmp_path / "a", base)
    torch.testing.assert_close(logits(base, tokens), logits(model, tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_bfloat16_adapter_brings_back_the_masters(form, trained, tiny_transformer, tmp_path):
    model, _, config = trained(form=form, dtype=torch.bfloat16)
    save_adapter(tmp_path / "a", model)
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
    model, _, _ = trained(dense=dense, basis=basis)
    save_adapter(tmp_path / "a", model)
    other, _, _ = tiny_transformer(family, **sizes)
    before = snapshot(other)
    with pytest.raises(ValueError, match="a: an adapter of another architecture|matches no module in full"):
        load_adapter(tmp_path / "a", other)
    assert_unchanged(other, before)


# ---- whoever changed the model ----


class History:
    """A base model and one that was made from it; each act is something that users do to it."""

    def __init__(self, blocks, bases, config, path):
        self.make, self.bases, self.config, self.path, self.numbers = blocks, bases, config, path, itertools.count()
        self.model = sparsify(self.base(), bases(), **config)
        self.optimizer = SparseGradAdamW(param_groups(self.model), lr=1e-2)

    def base(self):
        model = self.make()
        model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        return model

    def train(self, model=None, optimizer=None):
        train(model or self.model, optimizer or self.optimizer, [next(self.numbers)])

    def clip_and_throw_away(self):
        self.model(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
        clip_grad_norm_(self.model, 1.0)
        self.model.zero_grad()

    def another_optimizer(self):
        self.optimizer = SparseGradAdamW(param_groups(self.model), lr=1e-2)

    def dropping_optimizer(self):
        self.optimizer = SparseGradAdamW(param_groups(self.model), lr=1e-2, drop_after=1)

    def put_a_vector_in(self):
        """It replaces the parameters' ``data``."""
        vector = parameters_to_vector(self.model.parameters()).detach()
        vector_to_parameters(vector + 0.01 * torch.randn_like(vector), self.model.parameters())

    def load_earlier_moments(self):
        self.optimizer.load_state_dict(SparseGradAdamW(param_groups(self.model)).state_dict())

    def forget_a_layer(self):
        self.optimizer.forget(next(iter(sparsegrad_layers(self.model).values())))

    def load_weights(self):
        other = sparsify(self.base(), self.bases(), **self.config)
        optimizer = SparseGradAdamW(param_groups(other), lr=0.1)
        for _ in range(2):
            self.train(other, optimizer)
        self.model.load_state_dict(other.state_dict())

    def train_norm_and_freeze(self):
        norm = self.model.layers[1].norm
        norm.weight.data.mul_(1.1)
        norm.requires_grad_(False)
        self.another_optimizer()

    def count(self):
        self.model.count += 1

    def copy(self):
        self.model = copy.deepcopy(self.model)
        self.another_optimizer()

    def save_and_load(self):
        save_adapter(self.path, self.model)
        self.model = load_adapter(self.path, self.base())
        self.another_optimizer()

    def refresh(self):
        if self.config["form"] == "truncated":
            self.optimizer.zero_grad()
            refresh(self.model, self.bases(next(self.numbers)), self.optimizer)

    def loaded(self):
        save_adapter(self.path, self.model)
        return load_adapter(self.path, self.base())


ACTS = [name for name, value in vars(History).items() if callable(value) and name not in ("__init__", "base", "loaded")]


@pytest.fixture
def history(blocks, block_bases, block_patterns, tmp_path):
    """``history(form, **options)``."""

    def make(form, **options):
        config = {"k": 9, "target_modules": block_patterns, "form": form, **options}
        return History(blocks, block_bases, config, tmp_path / "adapter")

    return make


def same_function(one, other, exact=1e-10):
    states = [merge(copy.deepcopy(model)).state_dict() for model in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=exact, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS)
def test_an_act_of_each_kind_after_training_is_in_the_adapter(form, act, history):
    past = history(form)
    for name in ("train", "train", act, "train"):
        getattr(past, name)()
    same_function(past.model, past.loaded())
    assert act == "train" or not torch.equal(past.model.head.weight, past.base().head.weight)


@pytest.mark.parametrize("form", ["folded", "truncated"])
@hypothesis.settings(max_examples=10, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(acts=st.lists(st.sampled_from(ACTS), max_size=6))
def test_any_history_is_in_the_adapter(form, acts, history):
    past = history(form)
    for act in acts:
        getattr(past, act)()
    same_function(past.model, past.loaded())


@pytest.mark.parametrize("form", ["folded", "rotated"])
def test_entries_are_written_as_long_as_they_are_known(form, history):
    """Through states of the model too. Not the whole weight, unless others have written to it."""
    past = history(form)
    for act in ("train", "another_optimizer", "train", "save_and_load", "dropping_optimizer", "train", "train", "copy"):
        getattr(past, act)()
    layers = sparsegrad_layers(past.model)
    for _ in range(2):
        past.loaded()
        tensors = load_tensors(past.path)[0]
        assert all(len(tensors[f"values.{name}"]) <= 4 * layer.k for name, layer in layers.items())
        assert not any(name.startswith("weight.") for name in tensors)
        state = past.model.state_dict()
        past.model = sparsify(past.base(), past.bases(), **past.config)
        past.model.load_state_dict(state)
    past.model.load_state_dict({name: t * 1.5 if name.endswith("weight") else t for name, t in state.items()})
    past.loaded()
    assert {f"weight.{name}" for name in layers} == {n for n in load_tensors(past.path)[0] if n.startswith("weight.")}


@pytest.mark.parametrize("form", FORMS)
def test_what_did_not_change_is_not_written(form, history):
    """Though it was written to: data parallelism begins with everybody's weights from the first process."""
    past = history(form)
    past.model.load_state_dict(past.model.state_dict())
    past.loaded()
    assert {name.partition(".")[0] for name in load_tensors(past.path)[0]} == {"values", "basis"} | (
        set() if form == "truncated" else {"gaps"}
    )


# ---- the base ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["layers.1.up.weight", "layers.0.norm.bias", "count"])
def test_another_base_is_refused_by_the_name_of_what_differs(form, name, history):
    """One bit is enough; the architecture is the same."""
    past = history(form)
    past.model.layers[0].norm.requires_grad_(False)
    past.another_optimizer()
    past.train()
    save_adapter(past.path, past.model)
    base = past.base()
    tensor = base.state_dict()[name]
    tensor.view(-1)[0] = (
        torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0).double()) if tensor.is_floating_point() else 1
    )
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"an adapter of another base model: {name} differ"):
        load_adapter(past.path, base)
    assert_unchanged(base, before)


def test_an_adapter_of_an_older_version_is_refused_in_one_line(history):
    past = history("folded")
    save_adapter(past.path, past.model)
    tensors, metadata = load_tensors(past.path)
    save_tensors(past.path, tensors, {name: value for name, value in metadata.items() if name != "arguments"})
    with pytest.raises(
        ValueError, match=r"adapter lacks arguments: it is of an older version; save the adapter again\.$"
    ):
        load_adapter(past.path, past.base())


def test_a_base_in_another_precision_is_another_base(history):
    past = history("folded")
    past.train()
    save_adapter(past.path, past.model)
    with pytest.raises(ValueError, match=r"another base model: layers\.0\.up\.weight.*or are in another precision"):
        load_adapter(past.path, past.base().float())


def test_what_the_adapter_holds_may_differ_in_the_base(history):
    """A head that training has moved is in the file: whoever starts from a new head may load it."""
    past = history("folded")
    past.train()
    save_adapter(past.path, past.model)
    base = past.base()
    torch.nn.init.zeros_(base.head.weight)
    same_function(past.model, load_adapter(past.path, base))


# ---- arguments ----


def test_layers_hold_what_sparsify_was_given_and_their_copies_too(history):
    past = history("truncated", layers_to_transform=range(1, 2), ranks={"up": (3, 2), "down": (2, 4)}, keep=3)
    expected = past.config | {"layers_to_transform": [1], "ranks": {"up": [3, 2], "down": [2, 4]}}
    for model in (past.model, copy.deepcopy(past.model), pickle.loads(pickle.dumps(past.model))):
        layers = list(sparsegrad_layers(model).values())
        assert len(layers) == 2 and layers[0].arguments == expected
        assert all(layer.arguments is layers[0].arguments for layer in layers)  # one object
        assert json.loads(json.dumps(layers[0].arguments)) == expected


def test_a_model_that_sparsify_was_not_given_is_refused_before_anything_is_written(history):
    past = history("folded")
    alone = torch.nn.Sequential(copy.deepcopy(sparsegrad_layers(past.model)["layers.0.up"]))
    wrong = [
        (
            torch.nn.Sequential(past.model),
            r"it knows 0\.layers\.0\.up as layers\.0\.up\. Give the model that it was given",
        ),
        (past.model.layers, "it knows 0.up as layers.0.up"),
        (alone, "it knows 0 as layers.0.up"),
        (past.base(), "the model has no SparseGrad layers"),
    ]
    for model, text in wrong:
        with pytest.raises(ValueError, match=text):
            save_adapter(past.path, model)
    with pytest.raises(ValueError, match="bases='outside'; allowed: inside, reference"):
        save_adapter(past.path, past.model, bases="outside")
    assert not past.path.exists()


@pytest.mark.parametrize("given", [range(0, 2, 1), (0, 1), [1, 0]])
def test_ranges_and_tuples_are_stored_as_lists(given, history):
    past = history("truncated", layers_to_transform=given, ranks={"up": (3, 2), "down": (2, 4)})
    past.train()
    same_function(past.model, past.loaded())
    assert load_tensors(past.path)[1]["arguments"]["layers_to_transform"] == list(given)


@pytest.mark.parametrize("cast", ["by the model", "by the layer"])
def test_a_weight_that_was_rounded_is_in_the_adapter(cast, history):
    past = history("truncated", update="side")
    past.train()
    if cast == "by the model":
        past.model.layers.bfloat16().double()
    else:
        for layer in sparsegrad_layers(past.model).values():
            layer.store_weight(torch.bfloat16)
    same_function(past.model.double(), past.loaded())


@pytest.mark.parametrize("form", ["folded", "rotated"])
def test_a_cast_down_rounds_no_weight_that_is_trained(form, history):
    """Their float32 masters are what the weights were before it."""
    past = history(form)
    past.train()
    before = {name: layer.original_weight() for name, layer in sparsegrad_layers(past.model).items()}
    past.model.layers.bfloat16()
    same_function(past.model.double(), past.loaded(), exact=1e-6)
    for name, layer in sparsegrad_layers(past.model).items():
        torch.testing.assert_close(layer.original_weight(), before[name], rtol=0, atol=1e-6)
        assert layer.moved is not None


# ---- bases by reference, and what is held in memory ----


def test_an_adapter_by_reference_asks_for_its_bases_and_knows_them(history):
    """Given in another precision, and whole where the adapter has their leading rows."""
    for form in FORMS:
        past = history(form)
        past.train()
        save_adapter(past.path, past.model, bases="reference")
        assert not any(name.startswith("basis") for name in load_tensors(past.path)[0])
        save_bases(past.path.with_name("bases"), past.bases())
        for bases in (past.bases(), past.path.with_name("bases"), str(past.path.with_name("bases"))):
            same_function(past.model, load_adapter(past.path, past.base(), bases=bases))


def test_other_bases_are_refused_and_the_model_left_unchanged(history):
    past = history("folded")
    past.train()
    save_adapter(past.path, past.model, bases="reference")
    turned = past.bases() | {"down": past.bases(1)["down"]}
    for bases, text in [
        (None, "adapter: the adapter refers to bases that it does not hold: give bases"),
        (turned, r"the basis of kind 'down' is not the one that the adapter was trained in \(SHA-256 \w{12}, not"),
        ({"up": past.bases()["up"]}, "no basis for layer kind 'down'; given: up"),
        ({kind: basis.leading(3, 3) for kind, basis in past.bases().items()}, "'up' is not the one"),
    ]:
        base = past.base()
        before = snapshot(base)
        with pytest.raises(ValueError, match=text):
            load_adapter(past.path, base, bases=bases)
        assert_unchanged(base, before)


@pytest.mark.parametrize("form", FORMS)
def test_a_block_that_stands_in_two_places_is_held_once(form, history, monkeypatch):
    past = history(form)

    def base():
        model = past.make()
        model.layers[1] = model.layers[0]
        return model

    monkeypatch.setattr(past, "base", base)
    past.model = sparsify(base(), past.bases(), **past.config)
    past.another_optimizer()
    past.train()
    same_function(past.model, past.loaded())
    assert not any(name.endswith(("moved", "basis.U")) for name in load_tensors(past.path)[0])


DAMAGES = {
    "values fewer than their gaps": lambda name, tensor: tensor[1:] if name == "values.layers.1.down" else tensor,
    "values without gaps": lambda name, tensor: None if name == "gaps.layers.1.down" else tensor,
    "gaps without values": lambda name, tensor: None if name == "values.layers.1.down" else tensor,
    "nothing of a layer": lambda name, tensor: None if name.endswith(".layers.1.down") else tensor,
    "a place outside the matrix": lambda name, tensor: tensor + 90 if name == "gaps.layers.1.down" else tensor,
    "a weight of another shape": lambda name, tensor: tensor[:1] if name == "weight.layers.1.down" else tensor,
    "half a basis": lambda name, tensor: None if name == "basis.down.V" else tensor,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_model_left_unchanged(damage, history):
    past = history("folded")
    past.train()
    if "weight" in damage:
        with torch.no_grad():
            past.model.layers[1].down.weight.mul_(1.5)
    state = adapter_state(past.model)
    left = {name: DAMAGES[damage](name, tensor) for name, tensor in state.tensors.items()}
    base = past.base()
    before = snapshot(base)
    with pytest.raises(ValueError, match="a damaged adapter, of .* for layers.1.down|bases that it does not hold"):
        put_adapter(base, AdapterState({n: t for n, t in left.items() if t is not None}, state.metadata))
    assert_unchanged(base, before)


def test_a_state_in_memory_is_what_the_file_holds_and_stays_as_it_was(history):
    past = history("folded")
    past.train()
    trained, state = copy.deepcopy(past.model), adapter_state(past.model)
    past.train()
    past.model.load_state_dict({name: torch.zeros_like(t) for name, t in past.model.state_dict().items()})
    save_adapter(past.path, trained)
    tensors, metadata = load_tensors(past.path)
    assert metadata == json.loads(json.dumps(state.metadata)) and tensors.keys() == state.tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.tensors.items())
    base = past.base()
    assert put_adapter(base, state) is base
    same_function(trained, base)


# ---- differences: rounded, and the largest alone ----


@pytest.mark.parametrize(
    ("form", "basis"),
    [("folded", "full"), ("folded", "leading"), ("folded", "none"), ("rotated", "full"), ("rotated", "none")],
)
@pytest.mark.parametrize("entries", [None, 5, 1000])
@pytest.mark.parametrize("written", [False, True], ids=["by steps", "by others"])
def test_what_differences_lose_is_what_the_metadata_says(form, basis, entries, written, history):
    """Against the whole difference in original coordinates; the largest in the basis, by a full sort."""
    past = history(form)
    bases = {"full": past.bases(), "leading": {n: b.leading(6, 5) for n, b in past.bases().items()}, "none": None}[
        basis
    ]
    past.model = sparsify(past.base(), bases, **past.config)
    past.another_optimizer()
    past.train(), past.train()
    if written:
        past.model.load_state_dict(
            {n: t + 0.01 if n.endswith("up.weight") else t for n, t in past.model.state_dict().items()}
        )
    trained = sparsegrad_layers(past.model)
    save_adapter(past.path, past.model, differences_from=past.base(), entries=entries)
    tensors, metadata = load_tensors(past.path)
    loaded, base = sparsegrad_layers(load_adapter(past.path, past.base())), past.base()
    assert {t.dtype for name, t in tensors.items() if name.startswith("differences.")} == {torch.bfloat16}
    for name, layer in trained.items():
        start = base.get_submodule(name).weight.detach()
        change, found = layer.original_weight() - start, loaded[name].original_weight() - start
        assert found.norm() > 0
        lost = float((found - change).norm() / change.norm())
        assert metadata["lost"][name] == pytest.approx(lost, rel=1e-4, abs=1e-9)
        if entries == 5:
            b = layer.basis
            rotated = (change if b is None else b.V @ change @ b.U.T).flatten()
            expected = sorted(sorted(range(len(rotated)), key=lambda i: -abs(rotated[i]))[:5])
            assert from_gaps(tensors[f"gaps.{name}"]).tolist() == expected
        elif basis != "leading" or not written:
            assert lost < 2**-8
        if entries is None and layer.moved is not None:
            assert torch.equal(from_gaps(tensors[f"gaps.{name}"]), layer.moved)
    assert torch.equal(load_adapter(past.path, past.base()).head.weight, past.model.head.weight)  # not rounded


def test_differences_of_a_bfloat16_model_are_those_of_its_masters(trained, tiny_transformer, tmp_path):
    model, _, _ = trained(dtype=torch.bfloat16, dense=False)
    base, _, _ = tiny_transformer("bert", dtype=torch.bfloat16)
    start = {name: base.get_submodule(name).weight.detach().float() for name in sparsegrad_layers(model)}
    save_adapter(tmp_path / "a", model, differences_from=base)
    loaded = sparsegrad_layers(load_adapter(tmp_path / "a", base))
    for name, layer in sparsegrad_layers(model).items():
        change = layer.original_weight() - start[name]
        assert (loaded[name].original_weight() - layer.original_weight()).norm() < 2**-8 * change.norm()


def test_a_layer_that_no_step_has_moved_loses_nothing(history):
    past = history("folded")
    state = adapter_state(past.model, differences_from=past.base(), entries=3)
    assert set(state.metadata["lost"].values()) == {0.0}
    same_function(put_adapter(past.base(), state), past.base(), 0)


def test_differences_that_cannot_be_taken_are_refused(history):
    past = history("folded")
    past.train()
    other = past.base()
    other.layers[1].up.weight.data[0, 0] += 1
    for given, text in [
        ({"differences_from": other}, r"not the model that sparsify was given: layers\.1\.up\.weight differ or are"),
        ({"differences_from": past.model}, r"layers\.0\.up\.weight, .*differ or are missing"),
        ({"differences_from": past.base().layers}, "differ or are missing"),
        ({"entries": 5}, "entries=5; 1 or more, of the differences_from a base model: give both"),
        ({"differences_from": past.base(), "entries": 0}, "entries=0; 1 or more"),
    ]:
        with pytest.raises(ValueError, match=text):
            save_adapter(past.path, past.model, **given)
    with pytest.raises(ValueError, match=r"layers\.0\.up is of the truncated form, whose adapter holds the core as it"):
        save_adapter(past.path, history("truncated").model, differences_from=past.base())
    assert not past.path.exists()


# ---- gaps ----


@hypothesis.given(st.sets(st.one_of(st.integers(0, 600), st.integers(0, 2**33))))
def test_any_indices_come_back_from_their_gaps(places):
    indices = torch.tensor(sorted(places), dtype=torch.int64)
    found = from_gaps(to_gaps(indices))
    assert found.dtype == torch.int64 and torch.equal(found, indices)


@pytest.mark.parametrize(
    ("indices", "coded"),
    [
        ([], torch.tensor([], dtype=torch.uint8)),
        ([0, 1, 5], torch.tensor([0, 0, 3], dtype=torch.uint8)),
        ([254, 510, 1020], torch.tensor([254, 255, 0, 255, 254], dtype=torch.uint8)),
        ([40_000], torch.tensor([32767, 7233], dtype=torch.int16)),
        ([4_000_000_000], torch.tensor([2147483647, 1852516353], dtype=torch.int32)),
    ],
)
def test_gaps_by_hand(indices, coded):
    found = to_gaps(torch.tensor(indices, dtype=torch.int64))
    assert found.dtype == coded.dtype and torch.equal(found, coded)


def test_gaps_of_one_percent_take_little_more_than_a_byte():
    indices = torch.randperm(768 * 3072, generator=torch.Generator().manual_seed(0))[:23_593].sort().values
    assert to_gaps(indices).nbytes < 1.15 * len(indices)


# ---- entries of a rotated matrix ----


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("number", [0, 1, 30, 96, 700])
@pytest.mark.parametrize("cut", ["full", "leading", "input side"])
def test_entries_of_a_rotated_matrix_are_those_of_the_whole(shape, number, cut, random_basis):
    """Few are computed alone, many taken from the product."""
    basis = random_basis(*shape)
    basis = {"full": basis, "leading": basis.leading(20, 19), "input side": basis.input_side()}[cut]
    W = torch.randn(*shape, dtype=torch.float64)
    whole = (basis.V if basis.rotates_output else torch.eye(shape[0], dtype=torch.float64)) @ W @ basis.U.T
    indices = torch.randperm(whole.numel())[:number].sort().values
    torch.testing.assert_close(rotated_at(basis, W, indices), whole.flatten()[indices], rtol=0, atol=1e-12)
