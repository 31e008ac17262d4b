"""Adapters of PEFT at as many trained numbers as SparseGrad: against PEFT itself, and by hand."""

import peft
import pytest
import torch

from finetune.config.check import check_group
from finetune.methods.adapters import nearest_size
from finetune.methods.base import count_parameters
from finetune.training.losses import summed_loss

UP, DOWN = (64, 32), (32, 64)
K = 410  # of 64 x 32 entries, at a density of 0.2
DENSITY = "protocol.density=0.2"
# r (o + i), with o more of DoRA; of MiSS and LoRA-FA r o.
TRAINED = {
    "rslora": (4 * 96, 4 * 96),
    "dora": (4 * 96 + 64, 4 * 96 + 32),
    "shira": (4 * 96, 4 * 96),
    "miss": (6 * 64, 13 * 32),
    "lora_fa": (6 * 64, 13 * 32),
}
TYPES = {
    "rslora": ("LoraConfig", {"lora_alpha": 8.0, "use_rslora": True}),
    "dora": ("LoraConfig", {"lora_alpha": 8.0, "use_dora": True}),
    "shira": ("ShiraConfig", {"random_seed": 0}),
    "miss": ("MissConfig", {}),
    "lora_fa": ("LoraConfig", None),  # two ranks, and alpha by rank
}


@pytest.fixture
def batch(load):
    return load("cola")[1]["train"].batch(range(16))


def steps(model, optimizer, batch, times=3):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    losses = []
    for _ in range(times):
        loss = summed_loss(model(**inputs).logits, batch["labels"]) / 16
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_trains_as_many_numbers_keeps_the_function_and_merges(name, build, classifier, batch):
    method, plain = build(name, DENSITY), classifier(dropout=False)
    assert (method.entries(UP), method.entries(DOWN)) == TRAINED[name]
    expected = logits(plain, batch)
    counted = count_parameters(classifier(), method)
    model = method.prepare(classifier(dropout=False))
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-6)
    assert counted["trainable_per_layer"] == sum(TRAINED[name]) / 2
    assert counted["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = steps(model, method.optimizer(model, 1e-2, 0.0), batch)
    assert losses[-1] < losses[0]
    after = logits(model, batch)
    merged = method.merge(model)
    torch.testing.assert_close(logits(merged, batch), after, rtol=0, atol=1e-5)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert all(
        (t.module.weight - plain.get_submodule(t.name).weight).abs().max() > 1e-4 for t in method.targets.find(merged)
    )


@pytest.mark.parametrize("name", ["rslora", "shira", "miss"])
def test_a_run_is_that_of_pefts_own_class(name, build, classifier, batch):
    """The same adapter, put on by hand: the same loss at every step."""
    method = build(name, DENSITY, "protocol.train=targets")
    kind, arguments = TYPES[name]
    sizes = {"up": TRAINED[name][0] // 64, "down": TRAINED[name][1] // 32} if name == "miss" else {"up": 4, "down": 4}
    reference = classifier(dropout=False)
    by_kind = {k: [t.name for t in method.targets.find(reference) if t.kind == k] for k in ("down", "up")}
    parts = by_kind if name == "miss" else {"up": sorted(by_kind["down"] + by_kind["up"])}
    wrapped = None
    for kind_of_layer, names in parts.items():
        adapter = getattr(peft, kind)(r=sizes[kind_of_layer], target_modules=names, **arguments)
        if wrapped is None:
            wrapped = peft.get_peft_model(reference, adapter)
        else:
            wrapped.add_adapter("other", adapter)
    wrapped.base_model.set_adapter(list(wrapped.peft_config))
    biases = {f"base_model.model.{t.name}.base_layer.bias" for t in method.targets.find(classifier())}
    for parameter_name, parameter in wrapped.named_parameters():
        if parameter_name in biases:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    expected = steps(wrapped, optimizer, batch)
    model = method.prepare(classifier(dropout=False))
    found = steps(model, method.optimizer(model, 1e-2, 0.0), batch)
    assert found == pytest.approx(expected, rel=1e-6)


def test_lora_fa_leaves_a_as_it_was_drawn(build, classifier, batch):
    method = build("lora_fa", DENSITY)
    model = method.prepare(classifier(dropout=False))
    drawn = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    optimizer = method.optimizer(model, 1e-2, 0.0)
    steps(model, optimizer, batch)
    moved = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert len(drawn) == len(moved) == 4 and all(p.abs().max() > 0 for p in moved.values())
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) and not now[n].requires_grad for n, p in drawn.items())
    again = dict(method.prepare(classifier(dropout=False)).named_parameters())
    assert all(torch.equal(again[n], p) for n, p in drawn.items())  # a resumed run draws them again


def test_the_mask_is_drawn_from_the_runs_seed(config, classifier):
    from finetune.methods import build_method

    found = config("method=shira", DENSITY)

    def masks(seed):
        method = build_method(found["method"], found["model"], found["protocol"], seed=seed)
        model = method.prepare(classifier())
        return [m.shira_indices["default"] for m in model.modules() if hasattr(m, "shira_indices")]

    first, again, other = masks(1), masks(1), masks(2)
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "count", [lambda n: 96 * n, lambda n: 96 * n + 64, lambda n: 3 * n * n + 5, lambda n: 7, lambda n: 1000 // n]
)
@pytest.mark.parametrize("k", [1, 95, 150, 410, 2000])
def test_the_nearest_size_is_that_of_a_search_through_all(count, k):
    def trained(size):
        if size > 20:
            raise ValueError("too large")
        return count(size)

    found = nearest_size(trained, k, limit=2048)
    grows = count(2) > count(1)
    best = min(abs(count(size) - k) for size in range(1, 21))
    assert abs(count(found) - k) == best if grows else 1 <= found <= 20


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ({"config": "LoraConfig", "match": "lora_alpha", "arguments": {"r": 1}}, "match=lora_alpha: .* 96 .*k=410"),
        ({"config": "LoraConfig", "match": "lora_alpha", "arguments": {"r": 9}}, "match=lora_alpha: .* 864 .*k=410"),
        ({"config": "MissConfig", "match": "rank"}, "MissConfig with .*'rank': 1.* refuses these matrices: .*rank"),
        ({"config": "ShiraConfig", "seeded": "seed"}, "ShiraConfig with {'seed': 0} refuses these matrices: .*seed"),
        ({"config": "MissConfig", "match": "r", "freeze": ["lora_A"]}, "method.freeze has 'lora_A', which finds no"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(group, text, config, classifier):
    from finetune.methods import build_method

    found = config("method=dora", DENSITY)
    with pytest.raises(ValueError, match=text) as refusal:
        build_method({"name": "mine", "base": "peft"} | group, found["model"], found["protocol"]).prepare(classifier())
    assert "\n" not in str(refusal.value)


def test_lora_fa_merges_where_frozen_weights_are_stored_in_bfloat16(build, classifier, batch):
    method = build("lora_fa", DENSITY)
    model = method.prepare(classifier(dropout=False))
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    plain = classifier(dropout=False)
    for target in method.targets.find(merged := method.merge(model)):
        weight = plain.get_submodule(target.name).weight
        assert target.module.weight.dtype == torch.bfloat16 and (target.module.weight - weight).abs().max() > 0.01
    assert merged is not model


@pytest.mark.parametrize("option", ["match", "seeded"])
def test_an_argument_is_chosen_once(option):
    group = {
        "name": "mine",
        "label": "Mine",
        "base": "peft",
        "config": "ShiraConfig",
        "arguments": {"r": 2},
        option: "r",
    }
    with pytest.raises(ValueError, match=f"{option}=r sets this argument; arguments gives it too"):
        check_group("method", group)
