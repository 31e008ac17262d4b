"""Several processes, and a batch however cut, take the steps of one process: encoders and decoders, in float64."""

import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

SCRIPT = """
    import sys
    from pathlib import Path
    import torch, yaml
    from safetensors.torch import load_file, save_file
    from finetune.methods import build_method
    from finetune.models import checkpoint_activations
    from finetune.runs.cells import make_problem
    from finetune.training.loop import Training, train
    from finetune.training.processes import make_accelerator
    from finetune.training.options import TrainingOptions
    from finetune.training.refreshing import refresh_options
    from sparsegrad import Basis

    config, out, bases = yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), load_file(sys.argv[3])
    accumulation, checkpointing = int(sys.argv[4]), sys.argv[5] == "True"
    bases = {kind: Basis(bases[f"{kind}.U"], bases[f"{kind}.V"]) for kind in ("up", "down")}
    accelerator, problem = make_accelerator("cpu", "fp32"), make_problem(config)
    one = accelerator.num_processes == 1 and accumulation == 1
    for name, group in config["methods"].items():
        model = problem.load_model(problem.task, 0).double()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            checkpoint_activations(model)
        method = build_method(group, config["model"], config["protocol"], bases=bases, one_backward_a_step=one)
        torch.manual_seed(0)
        model = method.prepare(model)
        # Batches of 11 of 40 rows: the last of an epoch is short, and no cut of it is even.
        options = TrainingOptions(1e-2 if problem.group == "chat" else 1e-3, 11, 2, 8, 7, max_grad_norm=0.5,
                                  accumulation_steps=accumulation, schedule="cosine", warmup_steps=2)
        training = Training(model, method.optimizer(model, options.learning_rate, 0.0),
                            problem.splits(problem.task)["train"],
                            problem.evaluator(problem.task, options, accelerator), problem.metric(problem.task),
                            options, accelerator, refresh=refresh_options(group))
        steps = train(training).step
        if accelerator.is_main_process:
            save_file({k: v.clone() for k, v in method.merge(model).state_dict().items()}, out / f"{name}.safetensors")
            (out / f"{name}.txt").write_text(f"{steps} {accelerator.num_processes}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""
REAL = Path(os.environ.get("SPARSEGRAD_DATA", Path(__file__).parents[3] / "data"))


@pytest.fixture(params=["glue", "chat", "real chat"])
def trained(request, config, chat_config, ranks, tmp_path, monkeypatch):
    """``trained(processes, accumulation, checkpointing)``: weights and steps of every method."""
    make, change, (wide, narrow) = chat_config, ["scale.train_examples=40"], (48, 32)
    names = ["full", "lora", "sparsegrad"]
    if request.param == "glue":
        make, change, (wide, narrow) = config, [], (64, 32)
    elif request.param == "real chat":
        if not ((REAL / "oasst1").is_dir() and (REAL / "models" / "stories260K").is_dir()):
            pytest.skip(f"no oasst1 and models/stories260K in {REAL} (experiments/fetch.py brings them)")
        change += ["chat=oasst1", f"chat.root={REAL}", "model=stories260k", "model.folder=models/stories260K"]
        wide, narrow = 172, 64
    found = make(*change)
    found["methods"] = {name: make(f"method={name}")["method"] for name in names}
    if request.param == "glue":
        found["methods"]["truncated"] = found["methods"]["sparsegrad"] | {"form": "truncated"}
        found["methods"]["refreshed"] = found["methods"]["truncated"] | {"refresh": {"steps": 3, "batches": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found))
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    generator = torch.Generator().manual_seed(0)
    V, U = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (wide, narrow))
    tensors = {"up.U": U, "up.V": V, "down.U": V.T, "down.V": U.T}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "bases.safetensors")

    def run(processes, accumulation, checkpointing):
        out = tmp_path / f"{processes}-{accumulation}-{checkpointing}"
        out.mkdir()
        files = [tmp_path / "script.py", tmp_path / "config.yaml", out, tmp_path / "bases.safetensors"]
        arguments = [*map(str, files), str(accumulation), str(checkpointing)]
        if processes == 1:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0])
        else:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            started = [
                subprocess.Popen(
                    [sys.executable, *arguments], stderr=subprocess.PIPE, text=True, env=environment | rank
                )
                for rank in map(ranks, range(processes))
            ]
            for process in started:
                _, errors = process.communicate(timeout=240)
                assert process.returncode == 0, errors[-3000:]
        weights = {name: load_file(out / f"{name}.safetensors") for name in found["methods"]}
        return weights, {name: (out / f"{name}.txt").read_text().split() for name in weights}

    return run


def test_any_cut_of_a_batch_takes_the_steps_of_one_process(trained):
    one, steps = trained(1, 1, False)
    assert {tuple(step) for step in steps.values()} == {("8", "1")}
    for processes, accumulation, checkpointing in ((1, 4, True), (2, 2, True)):
        other, others = trained(processes, accumulation, checkpointing)
        assert others["full"] == ["8", str(processes)]
        for name, weights in one.items():
            assert weights.keys() == other[name].keys()
            # Keys' biases cancel in the softmax; eigenvectors of close eigenvalues magnify rounding.
            kept = [key for key in weights if not key.endswith("key.bias")]
            distance = max(float((weights[key] - other[name][key]).abs().max()) for key in kept)
            assert distance < (1e-7 if name == "refreshed" else 1e-9), (name, processes, accumulation, distance)
