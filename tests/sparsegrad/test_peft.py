"""The tuner of peft against the truncated form of this library, against nn.Linear, and through files."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from literal import plain
from torch import nn

from sparsegrad import (
    SparseGradAdamW,
    collect_moments,
    hosvd,
    merge,
    param_groups,
    save_bases,
    sparsify,
)

peft = pytest.importorskip("peft")
import sparsegrad.peft as ours  # noqa: E402 - needs peft

K = {"up": 20, "down": 15}


def adapted(model, bases=None, **options):
    targets = {} if {"target_modules"} & options.keys() else {"target_modules": ["up", "down"]}
    source = {"bases": bases} if bases else {"init_bases": "random"}
    return peft.get_peft_model(model, ours.SparseGradConfig(**targets, **source, **options))


def moved(model, seed=1, scale=1.0):
    """The same, with cores that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "sparsegrad_core" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def cores(model, adapter="default"):
    return {name: layer.sparsegrad_core[adapter] for name, layer in linears(model).items()}


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ours.Linear)}


def x_of(n=5, seed=2):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the same mathematics ----


def test_steps_of_torchs_adamw_equal_those_of_the_truncated_form(blocks, block_bases, block_patterns):
    bases = block_bases()
    mine = adapted(blocks(), bases, k=K)
    theirs = blocks().requires_grad_(False)
    for layer in theirs.layers:
        layer.up.weight.requires_grad_()
        layer.down.weight.requires_grad_()
    sparsify(theirs, bases, K, block_patterns, form="truncated", update="side")
    adamw = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    own = SparseGradAdamW(param_groups(theirs), lr=0.01)
    for step in range(10):
        for model, optimizer in ((mine, adamw), (theirs, own)):
            optimizer.zero_grad()
            (model(x_of(seed=step)) ** 2).sum().backward()
            optimizer.step()
        for name, core in cores(mine).items():
            other = theirs.get_submodule(name.removeprefix("base_model.model.")).core
            torch.testing.assert_close(core, other, rtol=0, atol=1e-12)
    merged, theirs = mine.merge_and_unload(), merge(theirs)
    before = blocks()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=0, atol=1e-12)
        assert ("up.weight" in name or "down.weight" in name) != torch.equal(weight, before.state_dict()[name])


def test_full_ranks_are_the_papers_coordinates(random_basis):
    """dS is V G U^T, all of it; S moves W by V^T S U."""
    linear = nn.Sequential(plain(out_features=7, in_features=6))
    basis, x = random_basis(7, 6), torch.randn(9, 6, dtype=torch.float64)
    model = adapted(copy.deepcopy(linear), {"0": basis}, target_modules=["0"], density=1.0)
    for network in (linear, model):
        torch.tanh(network(x)).square().sum().backward()
    (core,) = cores(model).values()
    torch.testing.assert_close(core.grad, basis.V @ linear[0].weight.grad @ basis.U.T, rtol=0, atol=1e-12)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.model.0.sparsegrad_core.default"]


class Transposed(nn.Sequential):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__(Conv1D(12, 8))


@pytest.mark.parametrize("sort", ["linear", "Conv1D", "input side"])
def test_forward_and_merge_are_those_of_a_weight_that_was_moved(sort, random_basis):
    network = Transposed().double() if sort == "Conv1D" else nn.Sequential(nn.Linear(8, 12).double())
    W = network[0].weight.detach().clone()
    W = W.T if sort == "Conv1D" else W
    basis = random_basis(12, 8).input_side() if sort == "input side" else random_basis(12, 8)
    model = moved(adapted(network, {"0": basis}, target_modules=["0"], k=50))
    (S,) = cores(model).values()
    r, c = S.shape
    assert (r, c) == ((12, 4) if sort == "input side" else (7, 7))
    V = torch.eye(12, dtype=torch.float64) if sort == "input side" else basis.V[:r]
    W_now, b, x = (W + V.T @ S @ basis.U[:c]).detach(), network[0].bias, torch.randn(3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, W_now, b), rtol=0, atol=1e-12)
    (layer,) = linears(model).values()
    stored = W_now.T if sort == "Conv1D" else W_now
    torch.testing.assert_close(layer.get_delta_weight("default"), stored - layer.get_base_weight(), rtol=0, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(layer.get_base_weight(), stored, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), F.linear(x, W_now, b), rtol=0, atol=1e-12)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), F.linear(x, W, b), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), F.linear(x, W_now, b), rtol=0, atol=1e-12)


def test_a_merged_adapter_is_taken_out_where_adapters_are_disabled(blocks, block_bases):
    model, x = moved(adapted(blocks(), block_bases(), k=K)), x_of()
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), blocks()(x), rtol=0, atol=1e-12)


def test_a_safe_merge_of_a_broken_adapter_leaves_the_weight(blocks, block_bases):
    model = adapted(blocks(), block_bases(), k=K)
    next(iter(cores(model).values())).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    layer = next(iter(linears(model).values()))
    assert torch.equal(layer.get_base_weight(), blocks().layers[0].up.weight)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_a_low_precision_model_has_a_float32_core_and_basis(precision, blocks, block_bases):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = moved(adapted(blocks(dtype=dtype), block_bases(), k=K), scale=0.1)
    held = model.base_model.sparsegrad_bases["default"]["up"]
    assert {core.dtype for core in cores(model).values()} == {held.U.dtype} == {torch.float32}
    reference = moved(adapted(blocks(dtype=torch.float32), block_bases(), k=K), scale=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        y = model(x_of().to(dtype))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(x_of().float()), rtol=0, atol=0.05)
    y.float().sum().backward()
    assert all(core.grad.dtype == torch.float32 for core in cores(model).values())
    assert held.to(torch.bfloat16).U.dtype == torch.float32


def test_a_quantised_linear_is_trained_beside_and_merged(tiny_transformer, tmp_path):
    """In int8 by torchao: merging quantises the sum again."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model, _, tokens = tiny_transformer("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model = moved(adapted(model, target_modules="all-mlp", density=0.1, task_type="CAUSAL_LM"), scale=0.1)
    logits = model(input_ids=tokens).logits
    logits.sum().backward()
    assert all(core.grad.any() for core in cores(model).values())
    with model.disable_adapter():
        assert (model(input_ids=tokens).logits - logits).abs().max() > 0.02
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=0, atol=0.01)


@pytest.mark.cuda
def test_an_adapter_of_a_card_is_that_of_the_cpu(blocks, block_bases, tmp_path):
    moved(adapted(blocks(), block_bases(), k=K)).save_pretrained(tmp_path)
    there = peft.PeftModel.from_pretrained(blocks().cuda(), tmp_path)
    made = moved(adapted(blocks().cuda(), block_bases(), k=K))
    expected = made.cpu()(x_of())
    assert {t.device.type for t in there.state_dict().values()} == {"cuda"}
    torch.testing.assert_close(there(x_of().cuda()).cpu(), expected, rtol=0, atol=1e-12)


# ---- several adapters ----


def test_adapters_of_other_bases_add_up_switch_and_are_deleted(blocks, block_bases):
    x, model = x_of(), moved(adapted(blocks(), block_bases(), k=K))
    first = model(x)
    model.add_adapter("second", ours.SparseGradConfig(target_modules=["up"], bases=block_bases(1), ranks=[2, 3]))
    torch.testing.assert_close(model(x), first)
    model.set_adapter("second")
    moved(model, seed=3)
    second = model(x)
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.layers[0].up
    both = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + both, layer.bias), rtol=0, atol=1e-12)
    model.set_adapter("second")
    model.delete_adapter("default")
    torch.testing.assert_close(model(x), second)
    assert list(model.base_model.sparsegrad_bases) == ["second"]


def test_a_batch_of_several_adapters_is_refused(blocks):
    model = adapted(blocks(), density=0.2)
    with pytest.raises(ValueError, match="adapter_names: SparseGrad takes no batches of several adapters"):
        model(x_of(2), adapter_names=["default", "default"])


def test_copies_share_nothing_and_bases_follow_the_copy(blocks):
    model = moved(adapted(blocks(), density=0.2))
    twin = copy.deepcopy(model)
    held = twin.base_model.sparsegrad_bases
    assert all(layer.bases is held for layer in linears(twin).values())
    held["default"]["up"].U.zero_()
    assert not torch.equal(twin(x_of()), model(x_of()))


# ---- files ----


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_brings_its_bases(low_cpu_mem_usage, blocks, block_bases, tmp_path):
    path = tmp_path / "bases.safetensors"
    save_bases(path, block_bases())
    model = moved(adapted(blocks(), str(path), k=K, modules_to_save=["head"]))
    model.base_model.model.head.weight.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bases"] is None
    path.unlink()
    loaded = peft.PeftModel.from_pretrained(blocks(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(x_of()), model(x_of()))
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path / "adapter", "again", is_trainable=True)
    loaded.set_adapter("again")
    assert torch.equal(loaded(x_of()), model(x_of()))
    again = adapted(blocks(), block_bases(), k=K, modules_to_save=["head"])  # a checkpoint, loaded while training
    again.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert torch.equal(again(x_of()), model(x_of()))


def test_a_trainer_that_goes_on_from_its_checkpoint_ends_where_the_first_did(tiny_transformer, tmp_path):
    """With gradient checkpointing, and the Trainer's own AdamW."""
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(3, 50, (16, 7), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}

    def trained(resume=None):
        model, _, _ = tiny_transformer("llama", dtype=torch.float32)
        model = adapted(model, target_modules="all-mlp", density=0.1, task_type="CAUSAL_LM")
        arguments = TrainingArguments(str(tmp_path), activation_checkpointing=True, **options, **quiet)
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return cores(model)

    whole, resumed = trained(), trained(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(core, resumed[name]) and core.abs().max() > 1e-3 for name, core in whole.items())


@pytest.mark.parametrize("source", ["path", "mapping", "random"])
def test_bases_by_reference_are_checked(source, blocks, block_bases, tmp_path):
    path = str(tmp_path / "bases.safetensors")
    save_bases(path, block_bases())
    given = {"path": path, "mapping": block_bases(), "random": None}[source]
    model = moved(adapted(blocks(), given, k=K, save_bases=False))
    model.save_pretrained(tmp_path / "adapter")
    config = ours.SparseGradConfig.from_pretrained(tmp_path / "adapter")
    assert not any("bases" in name for name in model.state_dict())
    if source == "mapping":
        with pytest.raises(ValueError, match="no bases: give bases"):
            peft.PeftModel.from_pretrained(blocks(), tmp_path / "adapter")
        config.bases = given
    loaded = peft.PeftModel.from_pretrained(blocks(), tmp_path / "adapter", config=config)
    assert torch.equal(loaded(x_of()), model(x_of()))
    if source == "random":
        config.seed = 1
    else:
        config.bases = block_bases(1)
    with pytest.raises(ValueError, match="is not the one that this adapter was trained in"):
        peft.PeftModel.from_pretrained(blocks(), tmp_path / "adapter", config=config)


def test_a_configuration_of_a_file_makes_no_adapter_by_itself(blocks, tmp_path):
    adapted(blocks(), density=0.2).save_pretrained(tmp_path)
    config = ours.SparseGradConfig.from_pretrained(tmp_path)
    config.init_bases = "given"
    model = peft.get_peft_model(blocks(), config)
    with pytest.raises(ValueError, match=r"adapter 'default' has no basis of kind 'up' yet.*PeftModel.from_pretrained"):
        model(x_of())
    with pytest.raises(ValueError, match="has no basis"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(("damage", "error"), [("gone", "U'"), ("rank", "it has ranks"), ("skewed", "orthogonality")])
def test_a_file_without_a_fitting_basis_is_refused(damage, error, blocks, tmp_path):
    from safetensors.torch import load_file, save_file

    adapted(blocks(), density=0.2).save_pretrained(tmp_path)
    tensors = load_file(file := tmp_path / "adapter_model.safetensors")
    name = "base_model.sparsegrad_bases.up.U"
    tensors[name] = {"gone": None, "rank": tensors[name][:1].clone(), "skewed": tensors[name] * 2}[damage]
    save_file({n: t for n, t in tensors.items() if t is not None}, file)
    with pytest.raises(ValueError, match=f"the adapter's file has no basis of kind 'up' that fits: .*{error}"):
        peft.PeftModel.from_pretrained(blocks(), tmp_path)


# ---- targets, kinds, sizes ----


def test_the_mlps_of_a_transformer_by_their_architecture_and_by_a_list(tiny_transformer, tmp_path):
    """The whole way: moments, HOSVD, a file of bases, an adapter; kinds are called alike on it."""
    model, _, tokens = tiny_transformer("llama")
    names = ["up_proj", "down_proj"]
    batch = {"input_ids": tokens, "labels": tokens}
    bases = {kind: hosvd(found) for kind, found in collect_moments(model, [batch] * 3, names).items()}
    save_bases(tmp_path / "bases", bases)
    config = ours.SparseGradConfig(
        task_type="CAUSAL_LM", target_modules=names, bases=str(tmp_path / "bases"), layers_to_transform=[1, 2]
    )
    listed = peft.get_peft_model(copy.deepcopy(model), config)
    assert set(listed.base_model.sparsegrad_bases["default"]) == {"mlp_up_proj", "mlp_down_proj"}
    assert config.cores == {"mlp_up_proj": [2, 2], "mlp_down_proj": [2, 2]}  # of 4 of 384 entries
    torch.testing.assert_close(listed(**batch).loss, model(**batch).loss)
    table = adapted(model, target_modules="all-mlp", density=0.1, layers_to_transform=[1, 2])
    assert set(table.base_model.sparsegrad_bases["default"]) == {"gate", "up", "down"}
    blocks = {name.split("layers.")[1] for name in linears(table)}
    assert blocks == {f"{n}.mlp.{kind}_proj" for n in (1, 2) for kind in ("gate", "up", "down")}
    assert blocks > {name.split("layers.")[1] for name in linears(listed)}


@pytest.mark.parametrize(
    ("size", "ranks"),
    [({}, [1, 1]), ({"density": 0.7}, [8, 8]), ({"k": {"up": 30}}, [5, 5]), ({"ranks": {"up": [3, 2]}}, [3, 2])],
)
def test_the_size_of_a_core(size, ranks, blocks, block_bases):
    model = adapted(blocks(), block_bases(), target_modules={"up": r"layers\.(?P<layer>\d)\.up"}, **size)
    assert model.peft_config["default"].cores == {"up": ranks}
    assert [list(core.shape) for core in cores(model).values()] == [ranks, ranks]


def test_random_bases_are_orthonormal_and_of_their_seed_and_kind(blocks):
    def held(**options):
        bases = adapted(blocks(), density=0.3, **options).base_model.sparsegrad_bases["default"]
        return {kind: basis.V for kind, basis in bases.items()}

    both, again = held(), held(target_modules=["down"])
    assert torch.equal(both["down"], again["down"]) and not torch.equal(held(seed=1)["up"], both["up"])
    torch.testing.assert_close(both["up"] @ both["up"].T, torch.eye(5, dtype=torch.float64))


def test_the_lines_of_the_page_run_as_written(tiny_transformer, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "peft.md").read_text()
    (lines,) = re.findall(r"```python\n(.+?)```", page, re.S)
    model, _, tokens = tiny_transformer("llama")
    given = {"model": model, "batches": [{"input_ids": tokens, "labels": tokens}] * 3}
    monkeypatch.chdir(tmp_path)
    exec(lines, given)
    before = given["model"](**given["batches"][0]).loss
    before.backward()
    given["optimizer"].step()
    assert given["model"](**given["batches"][0]).loss < before


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"k": 5, "density": 0.1}, "k=5 and density=0.1: give one of k, ranks and density"),
        ({"init_bases": "pca"}, "init_bases='pca'; allowed: given, random"),
        ({"init_bases": "random", "bases": "file"}, "leave bases out"),
        ({"target_modules": "up|down", "layers_to_transform": 1}, "cannot be used when target_modules is a str"),
        ({"target_modules": ["up"], "layers_pattern": "layers"}, "goes with layers_to_transform"),
        ({"target_modules": {"up": "up"}, "layers_pattern": "layers", "layers_to_transform": 0}, "name the blocks in"),
    ],
)
def test_options_that_contradict_each_other(options, error):
    with pytest.raises(ValueError, match=error):
        ours.SparseGradConfig(**options)


@pytest.mark.parametrize(
    ("network", "options", "error"),
    [
        (lambda: nn.ModuleDict({"a": nn.Linear(3, 3)}), {"init_bases": "given"}, "a: no bases: give bases"),
        (lambda: nn.ModuleDict({"a": nn.Conv2d(3, 3, 1)}), {}, "a: it is Conv2d; nn.Linear"),
        (
            lambda: nn.Sequential(nn.ModuleDict({"a": nn.Linear(3, 3)}), nn.ModuleDict({"a": nn.Linear(3, 4)})),
            {},
            r"1.a: it has shape \(4, 3\), another matrix of kind 'a' has \(3, 3\): give target_modules as a dict",
        ),
        (
            lambda: nn.TransformerEncoderLayer(4, 1, 4),
            {"target_modules": ["linear1"]},
            "linear1: TransformerEncoderLayer reads its weight past its forward",
        ),
        (lambda: nn.ModuleDict({"a": nn.Linear(3, 3)}), {"target_modules": None}, "knows no model of type"),
        (lambda: nn.ModuleDict({"a": nn.Linear(3, 3)}), {"ranks": [4, 1]}, r"a: ranks=\(4, 1\); this basis allows"),
    ],
)
def test_what_no_adapter_can_be_made_of(network, options, error):
    config = ours.SparseGradConfig(**{"target_modules": ["a"], "init_bases": "random"} | options)
    with pytest.raises(ValueError, match=error):
        peft.get_peft_model(network(), config)


def test_an_adapter_that_cannot_be_added_leaves_no_bases(blocks, block_bases):
    model = adapted(blocks(), block_bases(), k=K)
    with pytest.raises(ValueError, match="no basis for layer kind 'down'; given: up"):
        model.add_adapter("bad", ours.SparseGradConfig(target_modules=["down"], bases={"up": block_bases()["up"]}))
    with pytest.raises(ValueError, match=r"bases\['down'\] is a Tensor; give a Basis, hosvd of"):
        model.add_adapter("bad", ours.SparseGradConfig(target_modules=["down"], bases={"down": torch.ones(8, 12)}))
    assert list(model.peft_config) == list(model.base_model.sparsegrad_bases) == ["default"]


def test_injection_without_a_tuner_is_peft_s_own_refusal(blocks):
    with pytest.raises(ValueError, match="because it uses shared state stored on the tuner"):
        peft.inject_adapter_in_model(ours.SparseGradConfig(target_modules=["up"], init_bases="random"), blocks())


# ---- registration ----


def test_peft_knows_the_method_by_the_word_in_a_file():
    ours.register()
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["SPARSEGRAD"] is ours.SparseGradConfig
    assert json.dumps(ours.SparseGradType.SPARSEGRAD) == '"SPARSEGRAD"'
    config = peft.get_peft_config({"peft_type": "SPARSEGRAD", "target_modules": ["up"], "density": 0.1})
    assert isinstance(config, ours.SparseGradConfig) and config.peft_type == "SPARSEGRAD"


def test_another_peft_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, "SPARSEGRAD", peft.LoraConfig)
    with pytest.raises(ImportError, match=r"has a method SPARSEGRAD of its own .peft.tuners.lora.config."):
        ours.register()
    monkeypatch.delattr("peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(ImportError, match=r"works with peft 0.21; .* lacks PEFT_TYPE_TO_PREFIX_MAPPING"):
        ours.register()


def test_an_adapter_becomes_lora(blocks, block_bases):
    """An adapter is a difference of weights of rank min(r, c), so that peft's conversion loses nothing."""
    model = moved(adapted(blocks(), block_bases(), ranks=[3, 2]))
    config, tensors = peft.convert_to_lora(model, rank=2)
    lora = peft.get_peft_model(blocks(), config)
    peft.set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(lora(x_of()), model(x_of()), rtol=0, atol=1e-5)
