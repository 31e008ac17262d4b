"""Runs on dialogues: every method learns and merges, only the chosen matrices move, a batch may be cut in any way."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.methods import build_method, build_targets
from finetune.methods.base import count_parameters
from finetune.models import cast_frozen, load_causal
from finetune.runs import run as running
from finetune.runs.cells import Cell
from finetune.runs.chat import ChatProblem
from finetune.runs.preliminary import gradients_cell
from finetune.store import records
from finetune.training.evaluation import evaluate_causal
from finetune.training.gradients import Collected
from finetune.training.losses import summed_loss
from sparsegrad import GradientMoments, hosvd_of_unfoldings

METHODS = ("full", "lora", "meprop", "sparsegrad")
CPU = torch.device("cpu")


@pytest.fixture
def run(once, tmp_path):
    """``run("method=lora", ...)``: one run, its record; the merged model lies in tmp_path / "merged"."""
    return lambda *overrides: once(*overrides, task="oasst1", keep=tmp_path / "merged")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_its_merged_model_has_the_loss_of_the_record(method, run, chat_config, chat_root, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record, merged = run(f"method={method}"), tmp_path / "merged"
    losses = [evaluation["loss"] for evaluation in record["evaluations"]]
    assert record["status"] == "finished" and record["metric"] == "loss"
    assert len(losses) == 2 and record["score"] == min(losses) < record["baseline"]["loss"]
    assert record["run"] | {"config_hash": ""} == {
        "experiment": "hand", "kind": "llama", "model": "tiny", "method": method, "task": "oasst1", "seed": 1,
        "protocol": "sound", "scale": "smoke", "config_hash": "",
    }  # fmt: skip
    problem = ChatProblem(chat_config())
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert AutoTokenizer.from_pretrained(merged)("a dog").input_ids == problem.tokenizer("a dog").input_ids
    found = evaluate_causal(model, problem.splits()["validation"], 7, CPU)["loss"]
    assert found == pytest.approx(record["score"], abs=2e-6)
    marker = records.read_json(merged / "training.json")
    assert marker["config_hash"] == record["run"]["config_hash"] and marker["template"] == "llama-2"
    assert set(marker["files"]) == {path.name for path in merged.iterdir()} - {"training.json"}
    before = load_file(chat_root / "models" / "tiny" / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 3) for m in ("up", "down")}


@pytest.fixture
def half(chat_root, tmp_path):
    """The tiny LLaMA in float16 and several files, as LLaMa-2-7B's checkpoint lies."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = chat_root / "models" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    model.save_pretrained(tmp_path / "half", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "half")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    return tmp_path / "half"


class MadeInFloat32(TorchDispatchMode):
    """Counts the numbers of all new float32 tensors off the meta device."""

    def __init__(self):
        super().__init__()
        self.count, self.seen = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and not out.is_meta:
            if out.untyped_storage().data_ptr() not in self.seen:
                self.count += out.numel()
            self.seen.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("method", ["full", "lora"])
def test_of_a_checkpoint_in_half_precision_only_what_trains_is_made_float32(method, chat_config, half, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode sees its own thread
    sizes = ("scale.precision=bf16", "scale.frozen_dtype=bf16")
    problem = ChatProblem(chat_config(f"method={method}", f"model.checkpoint={half}", *sizes))
    stored = {name: tensor for file in half.glob("*.safetensors") for name, tensor in load_file(file).items()}
    with MadeInFloat32() as made:
        model = problem.load_model("oasst1", 1)
    trained = {n: p for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert set(trained) == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 3) for m in ("up", "down")}
    whole = sum(tensor.numel() for tensor in stored.values())
    assert sum(p.numel() for p in trained.values()) <= made.count < 0.5 * whole
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].to(torch.float32 if name in trained else torch.bfloat16))


def test_a_merged_model_is_there_whole_or_not_at_all(run, monkeypatch, tmp_path):
    def full_disk(*_):
        raise OSError("disk full")

    run("method=full")
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    monkeypatch.setattr("finetune.models.merged.write_json", full_disk)
    with pytest.raises(OSError, match="disk full"):
        run("method=full", "learning_rate=0.01")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".merged*"))


def test_checkpoints_leave_frozen_parameters_out(run, killed, tmp_path):
    killed(3, lambda: run("method=full", "scale.checkpoint_seconds=0"))
    [state, *_] = (tmp_path / "checkpoints").glob("*/step_*/model.safetensors")
    parameters = {name for name in load_file(state) if name.endswith("weight")}
    assert parameters == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 3) for m in ("up", "down")}


def test_the_summed_loss_is_transformers_own_times_its_tokens(chat_config):
    problem = ChatProblem(chat_config())
    model, split = problem.load_model("oasst1", 0), problem.splits()["train"]
    rows = [0, 2, 3]
    batch = split.batch(rows)
    out = model(**batch)
    assert 0 < split.targets(rows) < 3 * 31
    ours = summed_loss(out.logits, batch["labels"])
    assert float(ours.detach()) == pytest.approx(float(out.loss.detach()) * split.targets(rows), rel=1e-5)
    literal = sum(
        F.cross_entropy(out.logits[r, t], batch["labels"][r, t + 1]).item()
        for r in range(3)
        for t in range(31)
        if batch["labels"][r, t + 1] != -100
    )
    assert float(ours.detach()) == pytest.approx(literal, rel=1e-5)


def test_validation_loss_does_not_depend_on_the_batch(chat_config):
    problem = ChatProblem(chat_config())
    model, split = problem.load_model("oasst1", 0).double(), problem.splits()["validation"]
    losses = [evaluate_causal(model, split, size, CPU)["loss"] for size in (1, 4, 100)]
    assert max(losses) - min(losses) < 1e-12 and losses[0] == pytest.approx(math.log(400), abs=0.5)


# Which matrices


def test_gate_and_all_blocks_are_choices_of_the_protocol(chat_config):
    def shapes(method, *overrides):
        config = chat_config(f"method={method}", *overrides)
        model = load_causal(config["model"], config["chat"]["root"], 0)
        targets = build_targets(method, config["model"], config["protocol"])
        found = targets.set_trainable(model)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        return sorted(t.name.split("layers.")[1] for t in found), {n.split("layers.")[1] for n in trained}

    found, trained = shapes("sparsegrad")
    assert found == [f"{i}.mlp.{m}_proj" for i in (0, 3) for m in ("down", "up")]
    assert trained == {f"{name}.weight" for name in found}
    assert shapes("sparsegrad", "protocol.gate=[sparsegrad]")[0] == [
        f"{i}.mlp.{m}_proj" for i in (0, 3) for m in ("down", "gate", "up")
    ]
    found, trained = shapes("full", "protocol.also_train=[full]")
    assert len(found) == 4 and trained == {f"{i}.mlp.{m}_proj.weight" for i in (0, 3) for m in ("up", "down", "gate")}
    assert len(shapes("lora", "protocol.every_block=[lora]")[0]) == 8
    assert len(shapes("full", "protocol.every_block=[lora]")[0]) == 4


def test_a_gate_that_the_model_does_not_name_is_refused(chat_config):
    config = chat_config("protocol.gate=[full]", "~model.optional_modules.gate")
    with pytest.raises(ValueError, match="asks for gate_proj in method=full; model tiny names no such module"):
        build_targets("full", config["model"], config["protocol"])


@pytest.mark.parametrize("method", METHODS)
def test_counted_parameters(method, chat_config):
    config = chat_config(f"method={method}", "protocol.also_train=[full,sparsegrad]")
    problem = ChatProblem(config)
    model = problem.load_model("oasst1", 0)
    bases = problem.collect(model, "oasst1", 0, CPU).bases()
    found = count_parameters(model, build_method(config["method"], config["model"], config["protocol"], bases=bases))
    matrix, lora = 32 * 48, 2 * (32 + 48)
    expected = {"full": 6 * matrix, "lora": 4 * lora, "meprop": 4 * 40, "sparsegrad": 4 * 40 + 2 * matrix}
    assert found["trainable"] == expected[method] and found["wrapped_layers"] == 4


def test_kinds_that_share_their_input_share_u():
    generator = torch.Generator().manual_seed(0)
    stacks = {kind: torch.randn(5, 6, 4, generator=generator, dtype=torch.float64) for kind in ("up", "gate")}
    collected = Collected({kind: GradientMoments(6, 4) for kind in stacks}, {}, {})
    for kind, stack in stacks.items():
        for gradient in stack:
            collected.moments[kind].update(gradient)
    alone = collected.basis("up")
    collected.share_input(["up", "gate"])
    bases = collected.bases()
    joint = hosvd_of_unfoldings(torch.cat([stacks["up"], stacks["gate"]], dim=1))
    for kind in stacks:
        assert torch.allclose(bases[kind].U @ joint.U.T, torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert torch.equal(bases["up"].V, alone.V) and not torch.allclose(bases["up"].U, alone.U)
    with pytest.raises(ValueError, match=r"missing \['down'\]"):
        collected.share_input(["up", "down"])


def test_bases_of_a_run_with_gate_share_u(chat_config):
    problem = ChatProblem(chat_config("protocol.gate=[sparsegrad]"))
    bases = problem.collect(problem.load_model("oasst1", 0), "oasst1", 0, CPU).bases()
    assert set(bases) == {"up", "gate", "down"} and torch.equal(bases["up"].U, bases["gate"].U)


# Precision


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_are_stored_in_bf16_and_trained_ones_in_float32(method, run, chat_root, tmp_path, monkeypatch):
    seen, real = {}, running.train

    def look(training):
        seen.update({name: (p.requires_grad, p.dtype) for name, p in training.model.named_parameters()})
        return real(training)

    monkeypatch.setattr(running, "train", look)
    record = run(f"method={method}", "scale.precision=bf16", "scale.frozen_dtype=bf16")
    assert {(True, torch.float32), (False, torch.bfloat16)} == set(seen.values())
    assert record["score"] < record["baseline"]["loss"]
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_cast_frozen_leaves_trained_parameters(chat_config):
    model = ChatProblem(chat_config()).load_model("oasst1", 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    cast_frozen(model, torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "up_proj" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "up_proj" not in n} == {torch.bfloat16}


def test_bad_inputs(chat_config, run):
    with pytest.raises(ValueError, match="inputs of 200 tokens; this model has 128 positions"):
        run("scale.max_length=200", "chat.validation_share=0.5")
    with pytest.raises(ValueError, match="template"):
        run("model.template=null")
    with pytest.raises(ValueError, match="nowhere"):
        run("model.folder=nowhere", "model.checkpoint=null")
    problem = ChatProblem(chat_config())
    problem.splits()["train"].input_ids[0, 0] = 10_000
    with pytest.raises(ValueError, match="token 10000 of the data, but the model embeds 400"):
        problem.load_model("oasst1", 0)


def test_gradients_are_collected_with_the_rest_in_bf16(chat_config, tmp_path):
    from sparsegrad import load_tensors

    change = ["scale.precision=bf16", "scale.frozen_dtype=bf16"]
    for name, overrides in (("fp32", []), ("bf16", change)):
        gradients_cell(Cell(ChatProblem(chat_config(*overrides)), ["oasst1"], [], tmp_path / name))
    model = ChatProblem(chat_config(*change)).gradient_model("oasst1", 0)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 3) for m in ("up", "down")}
    one, two = (
        load_tensors(tmp_path / name / "gradients" / "tiny" / "oasst1.safetensors")[0] for name in ("fp32", "bf16")
    )
    for key, moment in one.items():
        assert moment.dtype == torch.float64 and moment.shape[0] == moment.shape[1]
        assert float((moment - two[key]).norm() / moment.norm()) < 0.05
