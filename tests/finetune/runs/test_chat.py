"""Runs on dialogues: every method learns and merges, only the chosen matrices move, a batch may be cut in any way."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from finetune.methods import build_method, build_targets
from finetune.methods.base import count_parameters
from finetune.models import cast_frozen, load_causal
from finetune.runs import run as running
from finetune.runs.cells import Cell, gradients_cell
from finetune.runs.chat import ChatProblem
from finetune.store import records
from finetune.training.evaluation import evaluate_causal, summed_loss
from finetune.training.gradients import Collected
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
    assert marker == {"config_hash": record["run"]["config_hash"], "template": "llama-2"}
    before = load_file(chat_root / "models" / "tiny" / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 3) for m in ("up", "down")}


def test_a_merged_model_is_there_whole_or_not_at_all(run, monkeypatch, tmp_path):
    def full_disk(*_):
        raise OSError("disk full")

    run("method=full")
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    monkeypatch.setattr(running.records, "write_json", full_disk)
    with pytest.raises(OSError, match="disk full"):
        run("method=full", "learning_rate=0.01")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".merged*"))


def test_checkpoints_leave_frozen_parameters_out(run, killed, tmp_path):
    killed(3, lambda: run("method=full", "scale.checkpoint_seconds=0"))
    [state, *_] = (tmp_path / "checkpoints").glob("*/step_*/model.safetensors")
    parameters = {name for name in load_file(state) if name.endswith("weight")}
    assert parameters == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 3) for m in ("up", "down")}


# A batch however cut

SCRIPT = """
    import sys
    from pathlib import Path
    import torch, yaml
    from safetensors.torch import load_file, save_file
    from finetune.runs.chat import ChatProblem
    from finetune.training.evaluation import evaluate_causal
    from finetune.methods import build_method
    from finetune.models import checkpoint_activations
    from finetune.training.loop import Training, make_accelerator, train
    from finetune.training.options import TrainingOptions
    from sparsegrad import Basis

    config, out, bases = yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), load_file(sys.argv[3])
    accumulation, checkpointing = int(sys.argv[4]), sys.argv[5] == "yes"
    bases = {kind: Basis(bases[f"{kind}.U"], bases[f"{kind}.V"]) for kind in ("up", "down")}
    accelerator, problem = make_accelerator("cpu", "fp32"), ChatProblem(config)
    for name, group in config["methods"].items():
        model = problem.load_model("oasst1", 0).double()
        if checkpointing:
            checkpoint_activations(model)
        one = accelerator.num_processes == 1 and accumulation == 1
        method = build_method(group, config["model"], config["protocol"], bases=bases, one_backward_a_step=one)
        torch.manual_seed(0)
        model = method.prepare(model)
        # batches of 11 of the rows: the last of an epoch is short, and no cut of it is even
        options = TrainingOptions(1e-2, 11, 2, 8, 7, accumulation_steps=accumulation, max_grad_norm=0.5,
                                  schedule="cosine", warmup_steps=2)
        splits = problem.splits()
        progress = train(Training(model, method.optimizer(model, 1e-2, 0.0), splits["train"],
                         lambda m: evaluate_causal(m, splits["validation"], 16, accelerator.device), "loss",
                         options, accelerator))
        if accelerator.is_main_process:
            save_file({k: v.clone() for k, v in method.merge(model).state_dict().items()}, out / f"{name}.safetensors")
            (out / f"{name}.txt").write_text(f"{progress.step} {accelerator.num_processes}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""


REAL = Path(os.environ.get("SPARSEGRAD_DATA", Path(__file__).parents[3] / "data"))


@pytest.fixture(params=["generated", "real"])
def trained(request, chat_config, ranks, tmp_path):
    """``trained(processes, accumulation, checkpointing)``: weights of three methods in float64 and the steps taken."""
    import yaml
    from safetensors.torch import save_file

    change, sizes = ["scale.train_examples=40"], (48, 32)
    if request.param == "real":
        if not ((REAL / "oasst1").is_dir() and (REAL / "models" / "stories260K").is_dir()):
            pytest.skip(f"no oasst1 and models/stories260K in {REAL} (SPARSEGRAD_DATA)")
        change += ["chat=oasst1", f"chat.root={REAL}", "model=stories260k", "model.folder=models/stories260K"]
        sizes = (172, 64)
    config = chat_config(*change)
    config["methods"] = {name: chat_config(f"method={name}")["method"] for name in ("full", "lora", "sparsegrad")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q.contiguous() for n in sizes
    )
    pairs = {"up": (narrow, wide), "down": (wide.T.contiguous(), narrow.T.contiguous())}
    tensors = {
        f"{kind}.{letter}": pair[i].contiguous() for kind, pair in pairs.items() for i, letter in enumerate("UV")
    }
    save_file(tensors, tmp_path / "bases.safetensors")

    def make(processes, accumulation, checkpointing):
        out = tmp_path / f"{processes}-{accumulation}-{checkpointing}"
        out.mkdir()
        files = [
            str(tmp_path / "script.py"),
            str(tmp_path / "config.yaml"),
            str(out),
            str(tmp_path / "bases.safetensors"),
        ]
        command = [sys.executable, *files, str(accumulation), "yes" if checkpointing else "no"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env=environment | (ranks(r) if processes > 1 else {})
            )
            for r in range(processes)
        ]
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
        steps = {name: (out / f"{name}.txt").read_text() for name in config["methods"]}
        return {name: load_file(out / f"{name}.safetensors") for name in config["methods"]}, steps

    return make


def test_two_processes_and_any_cut_of_a_batch_take_the_steps_of_one_process(trained):
    one, steps = trained(1, 1, False)
    assert len(set(steps.values())) == 1 and steps["full"].endswith(" 1")
    for processes, accumulation, checkpointing in ((1, 4, True), (2, 2, True)):
        other, others = trained(processes, accumulation, checkpointing)
        assert others["full"] == f"{steps['full'].split()[0]} {processes}"
        for name, weights in one.items():
            assert weights.keys() == other[name].keys()
            distance = max(float((weights[key] - other[name][key]).abs().max()) for key in weights)
            assert distance < 1e-9, (name, processes, accumulation, distance)


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


def test_bf16_storage_needs_bf16_arithmetic(chat_config):
    with pytest.raises(ValueError, match="frozen_dtype='bf16' with precision='fp32'; allowed: fp32, or bf16"):
        ChatProblem(chat_config("scale.frozen_dtype=bf16"))


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
