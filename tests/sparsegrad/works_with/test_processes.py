"""Data parallelism gives the steps of one process; what cuts weights apart is refused with the reason."""

import gc
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sparsegrad import CompactGradient, SparseGradAdamW, param_groups, sparsify

OPTIONS = [{"form": "folded"}, {"form": "rotated"}, {"form": "truncated"}, {"form": "truncated", "keep": 4}]
BACKWARD = [{"form": form, "select_in": "backward"} for form in ("folded", "rotated")]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
REFUSED = r"no longer those of their SparseGrad layers, whole: FSDP and DeepSpeed cut weights in parts"


@pytest.fixture
def made(blocks, block_bases, block_patterns):
    return lambda options: sparsify(blocks(), block_bases(), 9, block_patterns, **options)


@pytest.fixture
def group():
    """A group of one process, in this one."""
    gc.freeze()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # a wrapper that outlives the group waits, with the interpreter's lock, for threads that need it
    dist.destroy_process_group()
    gc.unfreeze()


@pytest.mark.parametrize("unused", [False, True], ids=["all used", "unused parameters"])
@pytest.mark.parametrize("options", [*BACKWARD, OPTIONS[0]], ids=lambda o: "-".join(o.values()))
def test_dense_gradients_are_summed_and_compact_ones_refused(options, unused, made, group):
    """Of two processes each would else step with its own entries."""
    model = made(options)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    value = wrapped(torch.randn(4, 8, dtype=torch.float64)).sum()
    if "select_in" in options:
        with pytest.raises(RuntimeError, match="Under data parallelism use select_in='step'"):
            value.backward()
    else:
        value.backward()
        assert not isinstance(model.layers[0].up.weight.grad, CompactGradient)


CUTS = {
    "fully_shard": fully_shard,
    "FSDP": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
}


@by_options
@pytest.mark.parametrize("early", [False, True], ids=["before its optimizer", "after its optimizer"])
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_weights_cut_apart_are_refused_with_the_reason(options, early, made, group):
    """When the groups are made, or at the first step of an optimizer that was made before; nothing has moved then."""
    cuts = CUTS if options["form"] != "truncated" else {"fully_shard": fully_shard}  # FSDP wants all weights to train
    for cut in cuts.values():
        model = made(options)
        optimizer = SparseGradAdamW(param_groups(model)) if early else None
        wrapped = cut(model)
        with pytest.raises(ValueError, match=REFUSED):
            param_groups(wrapped) if optimizer is None else optimizer.step()


# ---- two processes ----

SCRIPT = """
    import json, sys
    import torch, torch.distributed as dist
    from pathlib import Path
    from safetensors.torch import save_file
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
    from torch.nn.parallel import DistributedDataParallel as DDP
    from conftest import Blocks
    from sparsegrad import SparseGradAdamW, merge, load_bases, param_groups, sparsify

    rank, store, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    options, patterns = json.loads(sys.argv[4]), json.loads(sys.argv[5])
    bases = load_bases(out / "bases.safetensors")[0]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def made(own):
        torch.manual_seed(0)
        return sparsify(Blocks(2).double(), bases, 9, patterns, **own)

    for number, own in enumerate(options):
        model = made(own)
        wrapped = DDP(model)
        optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
        for step in range(3):
            x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            first, second = x[rank::2].chunk(2)
            optimizer.zero_grad()
            with wrapped.no_sync():
                (wrapped(first).square().mean() / 2).backward()
            (wrapped(second).square().mean() / 2).backward()
            optimizer.step()
        if rank == 0:
            save_file({n: t.clone() for n, t in merge(model).state_dict().items()}, out / f"{number}.safetensors")
    found = []
    for cut in (fully_shard, lambda model: FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))):
        for early in (False, True):
            model = made(options[0])
            optimizer = SparseGradAdamW(param_groups(model)) if early else None
            model = cut(model)
            try:
                param_groups(model) if optimizer is None else optimizer.step()
                found.append("not refused")
            except ValueError as error:
                found.append(str(error))
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(made, block_bases, block_patterns, tmp_path):
    """Sums over ranks and over micro-batches; and two ranks' FSDP is refused too.

    The comparison's own default tests take such steps too: tests/finetune/runs/test_processes.py.
    """
    from sparsegrad import merge, save_bases

    save_bases(tmp_path / "bases.safetensors", block_bases())
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    given = [tmp_path / "store", tmp_path, json.dumps(OPTIONS), json.dumps(block_patterns)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])  # for its blocks
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    ranks = [subprocess.Popen([sys.executable, tmp_path / "script.py", str(rank), *given], env=env) for rank in (0, 1)]
    assert [process.wait(120) for process in ranks] == [0, 0]
    for number, options in enumerate(OPTIONS):
        model = made(options)
        optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
        for step in range(3):
            x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        for name, tensor in load_file(tmp_path / f"{number}.safetensors").items():
            torch.testing.assert_close(tensor, merge(model).state_dict()[name], rtol=1e-9, atol=1e-12)
    refusals = json.loads((tmp_path / "0.json").read_text()) + json.loads((tmp_path / "1.json").read_text())
    assert len(refusals) == 8 and all("FSDP and DeepSpeed cut weights in parts" in text for text in refusals)
