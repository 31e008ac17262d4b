"""Four methods through one interface: what they train, what they leave alone, and that they leave a plain model."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForSequenceClassification

from finetune.methods import base_method, build_method, needs_bases, with_own_choices
from finetune.methods.base import count_parameters
from finetune.training.losses import summed_loss
from sparsegrad import SparseGradLinear, sparsegrad_layers

TARGETS = {f"bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in ("intermediate.dense", "output.dense")}
SIZE = 32 * 64
METHODS = ("full", "lora", "meprop", "sparsegrad")
HEAD = {"classifier.weight", "classifier.bias"}


@pytest.fixture
def batch(load):
    return load("cola")[1]["train"].batch(range(16))


@pytest.fixture
def step(batch):
    """``step(model, optimizer, times)``: plain steps on one batch; returns the losses."""

    def make(model, optimizer, times=1):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        losses = []
        for _ in range(times):
            loss = summed_loss(model(**inputs).logits, batch["labels"]) / 16
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return make


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def plain(name):
    """A parameter's name in the plain model; PEFT wraps."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def weights(model):
    return {plain(name): parameter.detach().clone() for name, parameter in model.named_parameters()}


def without_noise(found):
    """Keys' biases cancel in the softmax: their gradient is rounding noise, which Adam blows up."""
    return {name: weight for name, weight in found.items() if not name.endswith("key.bias")}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def trained(method, model, step, times=2, lr=1e-2):
    """Prepare, step, and say which parameters moved."""
    model = method.prepare(model)
    before = weights(model)
    step(model, method.optimizer(model, lr, 0.0), times)
    return model, changed(before, weights(model))


@pytest.mark.parametrize("one_backward", [False, True])
def test_prepare_leaves_the_function_as_it_was(method_name, one_backward, classifier, build, batch):
    expected = logits(classifier(), batch)
    model = build(method_name, one_backward=one_backward).prepare(classifier())
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("matmul", ["regular", "sparse_by_dense"])
@pytest.mark.parametrize("orientation", ["hosvd", "released"])
def test_prepare_leaves_the_function_as_it_was_in_the_papers_form(orientation, matmul, classifier, build, batch):
    overrides = ("method.form=rotated", f"method.matmul={matmul}", f"protocol.orientation={orientation}")
    model = build("sparsegrad", *overrides).prepare(classifier())
    torch.testing.assert_close(logits(model, batch), logits(classifier(), batch), rtol=0, atol=1e-5)


def test_every_trainable_parameter_is_in_exactly_one_group(method_name, classifier, build):
    method = build(method_name)
    model = method.prepare(classifier())
    optimizer = method.optimizer(model, 1e-3, 0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    expected = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held)) and set(held) == expected


@pytest.mark.parametrize(
    ("method_name", "overrides"),
    [
        ("full", ()),
        ("lora", ()),
        ("meprop", ("protocol.meprop_optimizer=adamw",)),
        ("meprop", ("protocol.meprop_optimizer=lazy_adam",)),
        ("sparsegrad", ()),
        ("sparsegrad", ("method.form=rotated",)),
        ("sparsegrad", ("method.form=truncated",)),
        ("sparsegrad", ("protocol.orientation=released",)),
    ],
)
def test_all_parameters_move_but_the_weights_that_lora_wraps(method_name, overrides, classifier, build, step):
    _model, moved = trained(build(method_name, *overrides), classifier(), step)
    everything = set(weights(classifier()))
    if method_name == "lora":
        adapters = {f"{name}.lora_{letter}.default.weight" for name in TARGETS for letter in "AB"}
        everything = everything - {f"{name}.weight" for name in TARGETS} | adapters
    assert moved == everything


def test_scope_mlp_trains_target_layers_and_head_alone(method_name, classifier, build, step):
    _, moved = trained(build(method_name, "protocol.train=mlp"), classifier(), step)
    expected = HEAD | {f"{name}.bias" for name in TARGETS}
    if method_name == "lora":
        expected |= {f"{name}.lora_{letter}.default.weight" for name in TARGETS for letter in "AB"}
    else:
        expected |= {f"{name}.weight" for name in TARGETS}
    assert moved == expected


def test_frozen_patterns_freeze_what_they_find_in_their_method_alone(method_name, classifier, build, step, compose):
    assert compose("protocol=released")["protocol"]["frozen"] == {"sparsegrad": ["LayerNorm"]}
    _model, moved = trained(build(method_name, f"+protocol.frozen.{method_name}=[LayerNorm]"), classifier(), step)
    norms = {name for name in weights(classifier()) if "LayerNorm" in name}
    assert len(norms) == 2 * (1 + 2 * 2) and not moved & norms
    assert {f"{name}.bias" for name in TARGETS} | HEAD <= moved
    _, moved = trained(build(method_name, "+protocol.frozen.other=[LayerNorm]"), classifier(), step)
    assert norms <= moved


def test_layers_to_transform_limits_every_method_to_those_blocks(method_name, classifier, build):
    method = build(method_name, "model.layers_to_transform=[1]", "protocol.train=mlp")
    model = method.prepare(classifier())
    trainable = {plain(name) for name, p in model.named_parameters() if p.requires_grad} - HEAD
    assert trainable and all(".layer.1." in name for name in trainable)


def test_lora_wraps_the_matrices_that_sparsegrad_wraps(classifier, build):
    lora, sparse = build("lora").prepare(classifier()), build("sparsegrad").prepare(classifier())
    wrapped = {plain(name) for name, module in lora.named_modules() if isinstance(module, LoraLayer)}
    rotated = {name for name, module in sparse.named_modules() if isinstance(module, SparseGradLinear)}
    assert wrapped == rotated == TARGETS


@pytest.mark.parametrize(("scale", "expected"), [("inverse_rank", 1 / 3), (2.0, 2.0)])
def test_lora_scale(scale, expected, classifier, build):
    model = build("lora", "model.lora_rank=3", f"protocol.lora_scale={scale}").prepare(classifier())
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert [layer.scaling["default"] for layer in layers] == pytest.approx([expected] * 4)
    assert {tuple(layer.lora_A["default"].weight.shape) for layer in layers} == {(3, 32), (3, 64)}


@pytest.mark.parametrize("overrides", [(), ("protocol.train=mlp",), ("protocol.meprop_optimizer=adamw",)])
def test_merge_gives_a_plain_model_of_the_same_function(
    method_name, overrides, classifier, build, batch, step, tmp_path
):
    method = build(method_name, *overrides)
    model, _moved = trained(method, classifier(), step, times=4)
    expected = logits(model, batch)
    merged = method.merge(model)
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(classifier(), batch), atol=1e-3)
    own = {type(module).__module__.split(".")[0] for module in merged.modules()}
    assert own <= {"torch", "transformers"}
    assert list(merged.state_dict()) == list(classifier().state_dict())
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True)
    torch.testing.assert_close(logits(loaded, batch), logits(merged, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["folded", "rotated"])
def test_sparsegrad_moves_k_rotated_entries_a_step(form, classifier, build, batch, random_bases, step):
    bases = random_bases()
    method = build("sparsegrad", f"method.form={form}", "protocol.density=null", "model.k=20", bases=bases)
    start = classifier()
    model, _ = trained(method, classifier(), step, times=1)
    for name in TARGETS:
        basis = bases["up" if "intermediate" in name else "down"]
        layer = model.get_submodule(name)
        delta = basis.rotate(layer.original_weight() - start.get_submodule(name).weight)
        moved = delta.abs().flatten() > 1e-3  # lazy Adam's first step is lr = 1e-2 for every kept entry
        assert int(moved.sum()) == 20
        torch.testing.assert_close(delta.abs().flatten()[moved], torch.full((20,), 1e-2), rtol=1e-2, atol=0)


def test_the_truncated_form_moves_a_square_block_within_the_budget(classifier, build, random_bases, step):
    """k = 30 entries are a core of 5 x 5; the method counts what trains, and nothing else moves."""
    method = build("sparsegrad", "method.form=truncated", "model.k=30", "protocol.density=null", one_backward=True)
    plain_model, bases = classifier(), random_bases()
    assert method.entries((64, 32)) == 25
    assert count_parameters(classifier(), method)["trainable_per_layer"] == 25
    model, _ = trained(method, classifier(), step)
    cores = [p for name, p in model.named_parameters() if name.endswith(".core")]
    assert [p.numel() for p in cores] == 4 * [25]
    merged = method.merge(model)
    for name in TARGETS:
        basis = bases["up" if "intermediate" in name else "down"]
        moved = merged.get_submodule(name).weight - plain_model.get_submodule(name).weight
        moved = basis.rotate(moved.detach())
        assert (moved[:5, :5].abs() > 1e-3).all()
        moved[:5, :5] = 0
        assert moved.abs().max() < 1e-5


def test_meprop_first_step_moves_the_largest_entries_of_the_gradient(classifier, build, batch, step):
    reference = classifier()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    (summed_loss(reference(**inputs).logits, batch["labels"]) / 16).backward()
    method = build("meprop", "protocol.meprop_optimizer=adamw", "protocol.density=null", "model.k=37")
    model, _ = trained(method, classifier(), step, times=1)
    for name in TARGETS:
        start, gradient = reference.get_submodule(name).weight, reference.get_submodule(name).weight.grad
        moved = (model.get_submodule(name).weight != start).flatten().nonzero().flatten()
        largest = gradient.abs().flatten().topk(37).indices.sort().values
        assert torch.equal(moved, largest)


def masked_adamw(model, batch, steps, k, lr):
    """D11 in plain torch: AdamW on gradients of which all but the k largest are zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    for _ in range(steps):
        (summed_loss(model(**inputs).logits, batch["labels"]) / 16).backward()
        for name in TARGETS:
            gradient = model.get_submodule(name).weight.grad
            gradient[gradient.abs() < gradient.abs().flatten().topk(k).values[-1]] = 0.0
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_meprop_adamw_is_adamw_on_the_masked_gradient(classifier, build, batch, step):
    method = build("meprop", "protocol.meprop_optimizer=adamw", "protocol.density=null", "model.k=37")
    model, _ = trained(method, classifier(), step, times=5)
    expected = weights(masked_adamw(classifier(), batch, 5, 37, 1e-2))
    for name, weight in without_noise(weights(model)).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_meprop_lazy_is_sparsegrad_without_rotation(classifier, build, batch, step):
    from sparsegrad import Basis

    identity = {"up": Basis(torch.eye(32), torch.eye(64)), "down": Basis(torch.eye(64), torch.eye(32))}
    lazy, _ = trained(build("meprop", "protocol.meprop_optimizer=lazy_adam"), classifier(), step, times=4)
    sparse, _ = trained(build("sparsegrad", bases=identity), classifier(), step, times=4)
    expected = weights(sparse)
    for name, weight in without_noise(weights(lazy)).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_density_wins_over_k(build):
    assert build("sparsegrad", "protocol.density=0.01", "model.k=5").entries((64, 32)) == round(0.01 * SIZE)
    assert build("meprop", "protocol.density=0.01", "model.k=5").entries((64, 32)) == round(0.01 * SIZE)
    assert build("sparsegrad", "protocol.density=null", "model.k=5").entries((64, 32)) == 5


@pytest.mark.parametrize("scope", ["all", "mlp"])
def test_counts_by_hand(method_name, scope, classifier, build):
    model = classifier()
    total = sum(p.numel() for p in model.parameters())
    entries = {"full": SIZE, "lora": 3 * (32 + 64), "meprop": 20, "sparsegrad": 20}[method_name]
    method = build(method_name, "protocol.density=null", "model.k=20", "model.lora_rank=3", f"protocol.train={scope}")
    around = total - 4 * SIZE if scope == "all" else 2 * (64 + 32) + 2 * 32 + 2  # biases and head
    assert count_parameters(model, method) == {
        "total": total,
        "trainable": around + 4 * entries,
        "trainable_per_layer": entries,
        "wrapped_layers": 4,
    }


def test_counts_are_those_of_the_prepared_model(classifier, build):
    for overrides in ((), ("protocol.train=mlp",), ("+protocol.frozen.lora=[LayerNorm, embeddings]",)):
        method = build("lora", *overrides)
        counted = count_parameters(classifier(), method)["trainable"]
        model = method.prepare(classifier())
        assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "lora", "total"),
    [
        ("bert_base", 53_505_794, 109_483_778),
        ("roberta_base", 68_669_186, 124_647_170),
        ("roberta_large", 156_492_802, 355_361_794),
    ],
)
def test_counts_of_the_papers_models(name, lora, total, compose):
    found = compose(f"model={name}", "method=lora", "protocol=printed")
    with torch.device("meta"):
        config = AutoConfig.for_model(**found["model"]["architecture"], num_labels=2)
        model = AutoModelForSequenceClassification.from_config(config)
    counts = count_parameters(model, build_method(found["method"], found["model"], found["protocol"]))
    matrices = 2 * config.num_hidden_layers
    per_layer = found["model"]["lora_rank"] * (config.hidden_size + config.intermediate_size)
    assert counts == {
        "total": total,
        "trainable": lora,
        "trainable_per_layer": per_layer,
        "wrapped_layers": matrices,
    }


LINEAR = r"target_modules.up='mlp.up' matches no module in full. Linear layers of .*bert\.encoder\.layer\.0\.attention"


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        *(("lora", (f"model.lora_rank={r}",), f"lora_rank={r}; allowed: 1 to 32 for these matrices") for r in (0, 33)),
        *(
            ("lora", (f"protocol.lora_scale={s}",), "protocol.lora_scale=.*; allowed: inverse_rank, or a positive")
            for s in ("rank", "-1.0", "0", "null", "true")
        ),
        ("meprop", ("protocol.meprop_optimizer=sgd",), "meprop_optimizer='sgd'; allowed: adamw, lazy_adam"),
        *(("sparsegrad", (f"protocol.density={d}",), f"density={d}; allowed: above 0, at most 1") for d in (0.0, 1.5)),
        ("sparsegrad", ("protocol.orientation=random",), "method.basis_seed"),
        ("sparsegrad", ("method.form=truncated", "+method.core=other"), "method.core='other'; allowed: square, input"),
        *((n, ("protocol.train=head",), "protocol.train='head'; allowed: all, mlp, targets") for n in METHODS),
        *((n, (f"+protocol.frozen.{n}=[LayrNorm]",), "frozen has 'LayrNorm', which finds no param") for n in METHODS),
        *((n, ("model.target_modules.up=mlp.up",), LINEAR) for n in METHODS),
        *(
            (n, ("protocol.density=null", "model.k=null"), "set protocol.density .a share of the entries. or model.k")
            for n in ("meprop", "sparsegrad")
        ),
        *(
            (n, ("protocol.density=null", "model.k=2049", f"protocol.meprop_optimizer={rule}"), "k=2049; a matrix of")
            for n in ("meprop", "sparsegrad")
            for rule in ("adamw", "lazy_adam")
        ),
    ],
)
def test_what_a_method_refuses(name, overrides, text, classifier, build):
    with pytest.raises(ValueError, match=text):
        build(name, *overrides).prepare(classifier())


def test_bases_that_are_missing_or_of_another_width_are_refused(config, classifier, build, random_bases):
    found, bases = config("method=sparsegrad"), random_bases()
    with pytest.raises(ValueError, match=r"method=sparsegrad needs bases: run the gradients and basis stages"):
        build_method(found["method"], found["model"], found["protocol"])
    with pytest.raises(ValueError, match=r"bert.encoder.layer.0.intermediate.dense: the basis is for weights of shape"):
        build("sparsegrad", bases={"up": bases["down"], "down": bases["up"]}).prepare(classifier())


# Variants


def test_the_control_trains_everything_but_the_matrices(build, classifier, batch):
    method = build("frozen_mlp")
    model = method.prepare(classifier())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = method.optimizer(model, lr=1e-2, weight_decay=0.0)
    model(**batch).loss.backward()
    optimizer.step()
    fixed = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert fixed == {f"{target.name}.weight" for target in method.targets.find(model)}
    counted = count_parameters(classifier(), method)
    assert counted["trainable_per_layer"] == 0
    assert counted["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_variant_is_its_base_with_choices_of_its_own(config):
    found = with_own_choices(config("method=sparsegrad_100k", "protocol.density=0.01"))
    assert base_method(found["method"]) == "sparsegrad" and needs_bases(found["method"])
    assert found["protocol"]["density"] == pytest.approx(0.0424, abs=1e-4)
    assert config("method=sparsegrad")["protocol"] == with_own_choices(config("method=sparsegrad"))["protocol"]


def test_a_variant_replaces_the_parts_that_it_names(config):
    before, after = config("method=truncated"), with_own_choices(config("method=truncated_own_basis"))
    assert after["protocol"]["preliminary"] == before["protocol"]["preliminary"] | {"scope": "run"}
    assert before["protocol"]["preliminary"]["scope"] == "task"
    assert {**after["protocol"], "preliminary": None} == {**before["protocol"], "preliminary": None}
    own = {"name": "mine", "base": "sparsegrad", "protocol": {"preliminary": {"step": 3}}}
    with pytest.raises(ValueError, match=r"method mine sets protocol\.preliminary\.step; allowed: .*'steps'"):
        with_own_choices(config() | {"method": own})
    with pytest.raises(ValueError, match=r"method mine sets protocol\.densty; allowed: .*'density'"):
        with_own_choices(config() | {"method": own | {"protocol": {"densty": 0.1}}})


def test_random_bases_are_orthogonal_drawn_from_their_seed_and_keep_the_function(build, classifier, batch):
    def bases(seed):
        method = build("sparsegrad_random", f"method.basis_seed={seed}", "protocol.orientation=random")
        model = method.prepare(classifier())
        torch.testing.assert_close(logits(model, batch), logits(classifier(), batch), rtol=0, atol=1e-6)
        return {layer.kind: layer.basis for layer in sparsegrad_layers(model).values()}

    first, again, other = bases(0), bases(0), bases(1)
    for kind, basis in first.items():
        assert basis.orthogonality_error() < 1e-5
        assert torch.equal(basis.U, again[kind].U) and not torch.allclose(basis.U, other[kind].U, atol=1e-2)
