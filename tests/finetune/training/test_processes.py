"""Which processes, device and precision a run has: the configuration's and the launcher's, whatever else is set."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DynamoBackend

from finetune.config.launch import is_first_process, processes
from finetune.training.processes import make_accelerator


@pytest.fixture
def environment(monkeypatch):
    """``environment("RANK=1", ...)``: these and no other variables of launchers, and an accelerate that knows none."""

    def make(*given):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for one in given:
            monkeypatch.setenv(*one.split("=", 1))
        PartialState._reset_state()

    yield make
    PartialState._reset_state()
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["RANK=1"],
        ["RANK="],
        ["LOCAL_RANK=1"],
        ["LOCAL_RANK="],
        ["RANK=3", "LOCAL_RANK=3", "WORLD_SIZE="],
        ["RANK=3", "WORLD_SIZE=1"],
        ["OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK=1"],
    ],
    ids=" ".join,
)
def test_what_an_earlier_shell_left_is_no_second_process(given, environment):
    environment(*given)
    accelerator = make_accelerator("cpu", "fp32")
    assert processes() == (0, 1) and is_first_process()
    assert (accelerator.num_processes, accelerator.is_main_process) == (1, True)


@pytest.mark.parametrize("given", [["WORLD_SIZE=2"], ["WORLD_SIZE=2", "RANK=2"], ["WORLD_SIZE=two", "RANK=0"]])
def test_half_a_launcher_is_refused(given, environment):
    environment(*given)
    with pytest.raises(ValueError, match="WORLD_SIZE='.*' with RANK='.*' .* launch sets both"):
        make_accelerator("cpu", "fp32")


def test_processes_that_accelerate_does_not_connect_are_refused(environment):
    """As in a pod of two: without LOCAL_RANK accelerate would train twice, and only one of them would write."""
    environment()
    make_accelerator("cpu", "fp32")  # accelerate knows of one
    environment_of_two = {"WORLD_SIZE": "2", "RANK": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_of_two.items():
            patch.setenv(name, value)
        assert not is_first_process()
        with pytest.raises(ValueError, match=r"RANK=1 and WORLD_SIZE=2 .* accelerate has process 0 of 1"):
            make_accelerator("cpu", "fp32")


@pytest.mark.parametrize(
    "given",
    [
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=32",
        "ACCELERATE_DYNAMO_BACKEND=inductor",
        "ACCELERATE_MIXED_PRECISION=fp16",
        "ACCELERATE_TORCH_DEVICE=meta",
    ],
)
def test_what_accelerate_reads_from_the_environment_changes_nothing(given, environment):
    environment(given)
    for precision, mixed in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):  # one process, several precisions
        made = make_accelerator("cpu", precision)
        assert made.mixed_precision == mixed and made.gradient_accumulation_steps == 1
        assert made.state.dynamo_plugin.backend == DynamoBackend.NO and made.device == torch.device("cpu")
    loss = torch.ones((), requires_grad=True)
    made.backward(loss * 1.0)
    assert loss.grad == 1.0


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launcher_that_cuts_models_apart_is_refused(name, environment):
    environment(f"ACCELERATE_USE_{name}=true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name} is set, .* what works is data parallelism"):
        make_accelerator("cpu", "fp32")
    environment(f"ACCELERATE_USE_{name}=false")
    make_accelerator("cpu", "fp32")


def test_a_device_that_is_not_there_is_refused(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environment("ACCELERATE_USE_CPU=true")
    assert make_accelerator("auto", "fp32").device == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda, but torch sees no CUDA device; use device=auto or device=cpu"):
        make_accelerator("cuda", "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device=cuda, but ACCELERATE_USE_CPU is set"):
        make_accelerator("cuda", "fp32")
