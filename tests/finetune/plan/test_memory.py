"""The plan's calculated bytes against bytes counted on models that are really built and stepped."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.checkpoint import checkpoint

from finetune import models
from finetune.methods import build_method
from finetune.plan import activations
from finetune.plan.memory import DTYPES, Setup, hosvd_memory, meta_model, preliminary_memory, training_memory
from finetune.store import records
from finetune.training import memory
from finetune.training.checkpoint import snapshot
from finetune.training.losses import summed_loss
from sparsegrad import Basis

ROOT = Path(__file__).resolve().parents[3]
ROWS, TOKENS, K = 2, 24, 50
METHODS = ("full", "lora", "meprop", "sparsegrad")
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
MODEL = {
    "name": "tiny",
    "architecture": ARCHITECTURE,
    "target_modules": {
        "up": r".*\.layers\.(?P<layer>\d+)\.mlp\.up_proj",
        "down": r".*\.layers\.(?P<layer>\d+)\.mlp\.down_proj",
    },
    "optional_modules": {"gate": r".*\.layers\.(?P<layer>\d+)\.mlp\.gate_proj"},
    "layers_to_transform": [0, 3],
    "lora_rank": 5,
    "k": K,
}
PROTOCOL = {
    "density": None,
    "orientation": "hosvd",
    "train": "targets",
    "frozen": {},
    "lora_scale": 2.0,
    "lora_dropout": 0.0,
    "meprop_optimizer": "lazy_adam",
}


def file(name):
    return yaml.safe_load((ROOT / f"conf/method/{name}.yaml").read_text())


FILES = {name: file(name) for name in METHODS}
EVERY = FILES | {name: file(name) for name in ("frozen_mlp", "dora", "truncated", "truncated_input")}
EVERY["backward"] = FILES["sparsegrad"] | {"select_in": "backward"}
EVERY["rotated"] = FILES["sparsegrad"] | {"form": "rotated"}
RIVALS = {name: file(name) for name in ("shira", "miss", "lora_fa", "random_entries", "random_entries_redrawn")}
BASES = {"up": Basis(torch.eye(32), torch.eye(80)), "down": Basis(torch.eye(80), torch.eye(32))}
BASES["gate"] = BASES["up"]
MATRIX = 32 * 80
BF16 = {"precision": "bf16", "frozen_dtype": "bf16"}
CHANGES = {
    "sound": {},
    "everything": {"train": "all"},
    "adamw": {"meprop_optimizer": "adamw", "also_train": ["full", "sparsegrad"]},
    "gate": {"gate": ["full", "sparsegrad", "meprop", "lora"], "lora_dropout": 0.05},
    "every block": {"every_block": ["lora"], "density": 0.1},
}


def really(method, protocol, setup):
    """Bytes of a model that is built, prepared and stepped once, counted by the package that runs use."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE)).train()
    once = setup.accumulation_steps == 1
    chosen = build_method((EVERY | RIVALS)[method], MODEL, protocol, bases=BASES, one_backward_a_step=once)
    model = chosen.prepare(model)
    models.cast_frozen(model, DTYPES[setup.frozen_dtype])
    if setup.checkpointing:
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    optimizer = chosen.optimizer(model, 1e-3, 0.0)
    found = {}
    for micro in range(setup.accumulation_steps):
        ids = torch.randint(0, 96, (ROWS, TOKENS))
        with memory.saved_activations(model, found, micro == 0):
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16"):
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            loss = summed_loss(logits.float(), ids)
        loss.backward()
    found["gradients"] = memory.gradient_bytes(model)
    optimizer.step()
    held = sum(tensor.nbytes for name, tensor in snapshot(model).items() if not name.endswith("refreshes"))
    return found | memory.components(model, optimizer) | {"snapshot": held}


def calculated(method, protocol, setup, model=MODEL):
    return training_memory((EVERY | RIVALS)[method], model, protocol, setup, causal=True)


SETUPS = {name: (changes, Setup(ROWS, TOKENS, 2)) for name, changes in CHANGES.items()} | {
    "bfloat16, one pass": ({}, Setup(ROWS, TOKENS, 1, **BF16)),
    "bfloat16, three": ({}, Setup(ROWS, TOKENS, 3, **BF16)),
    "bfloat16, more entries": ({"density": 0.1}, Setup(ROWS, TOKENS, 3, **BF16)),
}
# A core of all outputs needs more than 50 entries; with targets alone nothing of the control trains.
NEEDS = {"truncated_input": "density", "frozen_mlp": "train"}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (n, case)
        for n in EVERY
        for case, (changes, _) in SETUPS.items()
        if n != "backward" and (n not in NEEDS or NEEDS[n] in changes)
    ]
    + [(n, case) for n in RIVALS for case in ("sound", "bfloat16, more entries")],
)
def test_components_are_those_of_a_real_step(name, case):
    changes, setup = SETUPS[case]
    protocol = PROTOCOL | changes
    real, plan = really(name, protocol, setup), calculated(name, protocol, setup)
    for key in ("parameters", "gradients", "bases", "snapshot"):
        assert getattr(plan, key) == real[key], key
    assert plan.optimizer_state_first == real["optimizer_state"]
    assert plan.saved_activations == pytest.approx(real["saved_activations"], rel=0.001)


def test_bytes_by_hand():
    """Four matrices of 2560 numbers, two blocks of up and down, 50 entries each."""
    setup = Setup(ROWS, TOKENS, 4, touched=0.5)
    plan = {name: calculated(name, PROTOCOL, setup) for name in METHODS}
    assert {name: p.gradients for name, p in plan.items()} == {
        "full": 4 * 4 * MATRIX,
        "lora": 4 * 4 * 5 * (32 + 80),
        "meprop": 4 * 4 * MATRIX,
        "sparsegrad": 4 * 4 * MATRIX,
    }
    assert plan["full"].optimizer_state == plan["full"].optimizer_state_first == 8 * 4 * MATRIX
    assert plan["sparsegrad"].optimizer_state_first == 16 * 4 * K
    assert plan["sparsegrad"].optimizer_state == 16 * 4 * (MATRIX // 2 + K + MATRIX // 8)  # with the room for more
    assert plan["sparsegrad"].bases == 2 * 4 * (32**2 + 80**2) and plan["meprop"].bases == 0
    assert [plan[name].trained for name in METHODS] == [4 * MATRIX, 4 * 5 * 112, 4 * K, 4 * K]
    # Two matrices of a kind at once: absolute values and a mask beside their gradients; the update and its half.
    assert [plan[name].selection for name in METHODS] == [0, 0, 2 * 5 * MATRIX, 2 * 5 * MATRIX]
    assert plan["sparsegrad"].folding == 2 * 8 * MATRIX
    assert plan["lora"].folding == plan["meprop"].folding == 0
    for p in plan.values():
        steady = p.parameters + p.optimizer_state + p.bases
        assert p.peak == steady + max(p.gradients + p.activations, p.gradients + p.selection, p.folding, p.snapshot)
    touched_least = calculated("sparsegrad", PROTOCOL, Setup(ROWS, TOKENS, 4, touched=0.001))
    assert touched_least.optimizer_state == 4 * touched_least.optimizer_state_first


def test_with_one_backward_pass_a_step_sparsegrad_keeps_no_dense_gradient():
    once, several = (calculated(name, PROTOCOL, Setup(ROWS, TOKENS, 1)) for name in ("backward", "sparsegrad"))
    assert once.gradients == 12 * 4 * K and several.gradients == 4 * 4 * MATRIX
    assert once.selects_in_backward and not several.selects_in_backward
    assert once.peak - (once.parameters + once.optimizer_state + once.bases) == max(
        once.gradients + once.activations + once.selection, once.folding, once.snapshot
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_checkpointing_keeps_inputs_of_blocks_and_what_is_outside(name, precision):
    """With it, hooks see both and nothing else: what is saved inside a block is computed again."""
    setup = Setup(ROWS, TOKENS, 2, precision, "bf16" if precision == "bf16" else "fp32", checkpointing=True)
    real, plan = really(name, PROTOCOL, setup), calculated(name, PROTOCOL, setup)
    prepared = build_method(FILES[name], MODEL, PROTOCOL).prepare(meta_model(ARCHITECTURE, causal=True))
    dtype = DTYPES[setup.frozen_dtype]
    models.cast_frozen(prepared, dtype)
    found = activations.measure(prepared, ROWS, TOKENS, precision=precision)
    assert found.outside + found.inputs == pytest.approx(real["saved_activations"], rel=0.001)
    assert len(found.blocks) == 4 and found.inputs == 4 * ROWS * TOKENS * 32 * dtype.itemsize
    assert found.logits == 2 * 4 * ROWS * TOKENS * 96
    assert plan.activations == found.inputs + max(found.copies + max(found.blocks), found.outside + found.logits)
    assert plan.activations < plan.saved_activations == sum(found.blocks) + found.copies + found.outside
    assert (found.copies > 0) == (precision == "bf16")


def test_logits_in_chunks_are_not_saved():
    """Of 4 rows of 32 tokens the head keeps no log-probabilities, and hidden states of 31 tokens in place of 32."""
    sizes = yaml.safe_load((ROOT / "conf/model/tiny_llama.yaml").read_text())["architecture"] | {"vocab_size": 500}
    whole, chunked = (
        activations.measure(meta_model(sizes, causal=True), 4, 32, precision="fp32", logits_chunk=chunk)
        for chunk in (None, 16)
    )
    assert whole.saved - chunked.saved == pytest.approx(4 * 4 * 31 * 500 + 4 * 4 * 64, abs=64)
    assert (whole.logits, chunked.logits) == (8 * 4 * 32 * 500, 12 * 16 * 500)


def test_a_model_without_an_architecture_is_refused():
    with pytest.raises(ValueError, match="memory is calculated from an architecture: give one"):
        meta_model(None, causal=True)


# Classifiers


RECORD = ROOT / "results/local/efficiency/minilm/cola.json"


@pytest.mark.parametrize("name", ["full", "lora", "truncated", "truncated_input"])  # others select otherwise since
def test_memory_of_classifiers_is_what_the_allocator_measured(name):
    if not RECORD.is_file():
        pytest.skip(f"{RECORD} is not there: make repro EXPERIMENT=local")
    variant = next(v for v in records.read_json(RECORD)["variants"] if v["name"] == name)
    measured, (rows, tokens) = variant["memory"], variant["memory"]["batch"]
    model = yaml.safe_load((ROOT / "conf/model/minilm.yaml").read_text())
    protocol = yaml.safe_load((ROOT / "conf/protocol/sound.yaml").read_text())

    found = training_memory(EVERY[name], model, protocol, Setup(rows, tokens), causal=False)
    assert found.optimizer_state == pytest.approx(measured["components"]["optimizer_state"], rel=1e-5)
    for component in ("parameters", "gradients", "bases"):
        assert getattr(found, component) == measured["components"][component], component
    assert found.saved_activations == pytest.approx(measured["components"]["saved_activations"], rel=0.0005)
    assert found.step_peak == pytest.approx(measured["peak_training"], rel=0.015)


# Before training


def test_the_preliminary_phase_is_counted_as_it_runs():
    """Against the collection itself: moments and the largest saved activations of its batches."""
    total = sum(p.numel() for p in meta_model(ARCHITECTURE, causal=True).parameters())

    def calculated(update):
        plain = meta_model(ARCHITECTURE, causal=True)
        targets = build_method(FILES["full"], MODEL, PROTOCOL).targets.find(plain)
        return preliminary_memory(plain, targets, {"batch_size": 3, "update": update}, Setup(ROWS, TOKENS, 4))

    plan = calculated(False)
    assert plan["parameters"] == 4 * total
    assert plan["moments"] == sum(8 * (a * a + b * b) for a, b in ((80, 32), (32, 80)))
    model = meta_model(ARCHITECTURE, causal=True).to_empty(device="cpu").requires_grad_(False).train()
    for block in (0, 3):
        model.model.layers[block].mlp.up_proj.weight.requires_grad_(True)
        model.model.layers[block].mlp.down_proj.weight.requires_grad_(True)
    notes, ids = {}, torch.zeros(3, TOKENS, dtype=torch.long)
    with memory.saved_activations(model, notes, True):
        loss = summed_loss(model(input_ids=ids, use_cache=False).logits, ids)
    assert loss.requires_grad  # the graph is there while it is counted
    assert plan["activations"] == pytest.approx(notes["saved_activations"] + 2 * 4 * 3 * TOKENS * 96, rel=0.001)
    assert calculated(True)["gradients"] - plan["gradients"] == 12 * total


def test_hosvd_is_counted_for_one_projection():
    plan = hosvd_memory([(80, 32), (32, 80)])
    assert plan["moments"] == 8 * (32**2 + 80**2)
    # Of up U (32) comes first and V (80) beside it; of down V is the smaller one, and U is alone at its peak.
    assert plan["peak"] == plan["moments"] + 8 * 32**2 + 5 * 8 * 80**2


# The paper's decoder


def test_llama_2_7b_in_the_papers_set_up():
    """The share of the trained matrices is the paper's 14.72 % and 0.158 %; bytes by hand."""
    model = yaml.safe_load((ROOT / "conf/model/llama2_7b.yaml").read_text())
    setup = Setup(2, 512, 32, "bf16", "bf16", checkpointing=True, touched=0.2)
    full, lora, sparse = (calculated(name, PROTOCOL, setup, model) for name in ("full", "lora", "sparsegrad"))
    matrix, total = 11008 * 4096, 6_738_415_616
    assert full.trained == 22 * matrix and round(100 * full.trained / total, 2) == 14.72
    assert sparse.trained == 22 * 100_000
    assert full.parameters == sparse.parameters == 2 * total + 2 * 22 * matrix
    assert full.gradients == 4 * 22 * matrix and full.optimizer_state == 8 * 22 * matrix
    assert sparse.bases == 2 * 4 * (11008**2 + 4096**2)
    assert lora.peak < sparse.peak < full.peak < 48e9
    # Inputs of 32 blocks, autocast's copies of 21 of 22 matrices (block 0 needs no gradient of its input), one block.
    assert full.activations > 32 * 2 * 512 * 4096 * 2 + 21 * matrix * 2
    assert full.activations < full.saved_activations
