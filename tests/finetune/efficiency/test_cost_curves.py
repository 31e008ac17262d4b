"""Cost of one MLP's step: variants take the steps they should, operations are those counted, the record is whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.efficiency import cost_curves as module
from finetune.efficiency import machine
from finetune.efficiency.cost_curves import CLOCKS, CurveOptions, cost_curves, read_config, summary
from finetune.efficiency.layer_variants import (
    LAYER_VARIANTS,
    Point,
    layer_step,
    make_bases,
    make_batch,
    make_layer,
    step_flop,
    touched,
    variants_at,
)
from finetune.efficiency.stage import Stage

CPU = torch.device("cpu")
RECORD = Path(__file__).parents[3] / "results/local/cost_curves.json"
POINT = Point(16, 64, 48, 0.07)
OPTIONS = CurveOptions(
    base=POINT, densities=[0.2], tokens=[8], widths=[8], decay=1.0, rounds=2, steps=2, warmup_steps=1, device="cpu"
)


def product(a, b, **_):
    """Operations of a product; torch counts a sparse one as if it were dense."""
    return 2 * (a._nnz() if a.layout == torch.sparse_csr else a.numel()) * b.shape[1]


product._get_raw = True  # tensors, not shapes
COUNTED = {
    torch.ops.aten.mm: product,
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],  # torch counts none of these
}


@pytest.fixture
def stepped():
    """A variant after n steps, with its batch and the bases."""

    def make(name, point=POINT, steps=1, learning_rate=0.01):
        bases = make_bases(point, 0, CPU)
        batch = make_batch(point, bases, 1)
        trainee = make_layer(name, point, bases, seed=0, learning_rate=learning_rate)
        for _ in range(steps):
            layer_step(trainee, batch, "fp32")
        return trainee, batch, bases

    return make


# ---- the variants ----


@pytest.mark.parametrize("changes", [{"tokens": 8}, {"tokens": 400}, {"density": 0.003}, {"decay": 2.0}], ids=str)
@pytest.mark.parametrize("name", LAYER_VARIANTS)
def test_operations_by_formula_are_those_that_torch_counts(name, changes, stepped):
    point = replace(POINT, **changes)
    name = name if name in variants_at(point) else "truncated"  # a core of all outputs has more entries than k
    trainee, batch, _ = stepped(name, point, learning_rate=0.0)  # the same entries at every step
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        layer_step(trainee, batch, "fp32")
    share = counter.get_total_flops() / step_flop(name, point, CPU)
    if name == "folded":  # folding back is counted at most, and the product of its few entries is a sparse one
        assert 0.7 < share <= 1.0
    else:
        assert share == pytest.approx(1.0, rel=1e-3)


def test_the_floor_moves_nothing_and_every_other_variant_moves_both_matrices(stepped):
    start = make_layer("floor", POINT, make_bases(POINT, 0, CPU), seed=0).model
    x = torch.randn(5, 16)
    for name in LAYER_VARIANTS:
        trainee, batch, _ = stepped(name)
        assert batch["x"].grad.shape == (48, 16) and batch["x"].grad.abs().sum() > 0
        moved = [n for n, p in trainee.model.named_parameters() if p.requires_grad]
        with torch.no_grad():
            same = torch.allclose(trainee.model(x), start(x), atol=1e-6)
        assert same == (name == "floor") and bool(moved) == (name != "floor")
        if name != "floor":
            assert any("up" in n for n in moved) and any("down" in n for n in moved)


def test_all_variants_begin_as_the_same_function(stepped):
    outputs = [stepped(name, steps=0)[0].model(torch.ones(3, 16)).detach() for name in LAYER_VARIANTS]
    assert all(torch.allclose(y, outputs[0], atol=1e-5) for y in outputs)


def test_loras_rank_and_the_core_have_the_budget_of_k():
    point = Point(768, 3072, 2048, 0.01)
    assert point.k == 23593 and point.lora_rank == 6 and abs(6 * 3840 / point.k - 1) < 0.05
    assert Point(768, 3072, 1, 1e-9).k == 1 and Point(768, 3072, 1, 1e-9).lora_rank == 1


def test_a_core_of_all_outputs_needs_a_k_of_their_number():
    point = Point(16, 64, 8, 64 / 1024)
    assert point.k == 64 and "truncated_input" in variants_at(point)
    assert "truncated_input" not in variants_at(replace(point, density=63 / 1024))


def test_decay_draws_the_entries_into_leading_rows_and_columns(stepped):
    flat = touched(stepped("folded")[0])
    leading = touched(stepped("folded", replace(POINT, decay=2.0))[0])
    assert leading["up"][1] < flat["up"][1] and leading["down"][0] < flat["down"][0]
    assert touched(stepped("truncated")[0]) == {} == touched(stepped("floor")[0])


# ---- the record ----


def test_a_record_holds_every_curve_through_one_base_and_is_reused(tmp_path):
    stage = Stage(tmp_path / "curves.json", "cost_curves", tmp_path / "kept", progress=False)
    found = cost_curves(OPTIONS, stage)
    assert json.loads(stage.path.read_text()) == found and list((tmp_path / "kept").iterdir()) == []
    assert len(found["points"]) == 5 and all(found["base"] in places for places in found["curves"].values())
    assert found["points"][found["decaying"]]["point"]["decay"] == 1.0
    assert [found["points"][place]["k"] for place in found["curves"]["k"]] == [72, 205]
    assert [found["points"][place]["point"]["tokens"] for place in found["curves"]["tokens"]] == [8, 48]
    widths = [found["points"][place]["point"] for place in found["curves"]["width"]]
    assert [(w["hidden"], w["inner"]) for w in widths] == [(8, 32), (16, 64)]
    for point in found["points"]:
        small = point["k"] < point["point"]["inner"]
        assert small == (point["point"]["hidden"] == 8)
        assert list(point["variants"]) == [n for n in LAYER_VARIANTS if not (small and n == "truncated_input")]
        for variant in point["variants"].values():
            assert variant["step_seconds"]["n"] == 4 and len(variant["rounds"]) == 2 and min(variant["rounds"]) > 0
        assert point["variants"]["full"]["over_full"]["mean"] == 1 == point["variants"]["floor"]["over_floor"]["mean"]
    before, left = stage.path.read_bytes(), tmp_path / "kept" / found["run"]["config_hash"]
    left.mkdir()  # by a kill after the record
    cost_curves(OPTIONS, stage)
    assert stage.path.read_bytes() == before and not left.exists()
    assert any("folded_over_rotated_regular: time" in line for line in summary(found))


def test_ratios_are_of_the_times_of_the_same_round(monkeypatch):
    seconds = {name: [[1.0, 2.0], [3.0, 4.0]] for name in LAYER_VARIANTS}
    seconds |= {"folded": [[2.0, 4.0], [3.0, 4.0]], "rotated_regular": [[4.0, 8.0], [12.0, 16.0]]}
    made = []

    def measured(makers, batches, **options):
        made.extend(make() for make in makers.values())
        assert len(batches) == 2 and options["rounds"] == 2 and options["together"]
        return seconds

    monkeypatch.setattr(module, "time_variants", measured)
    found = module.measure_point(POINT, OPTIONS, CPU)
    assert found["pairs"]["folded_over_rotated_regular"]["rounds"] == [0.5, 0.25]
    assert found["variants"]["folded"]["over_full"] == {"mean": 1.5, "rounds": [2.0, 1.0]}
    assert found["variants"]["folded"]["step_seconds"]["median"] == 3.5
    assert found["variants"]["full"]["rounds"] == [1.5, 3.5]


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_the_clock_that_was_asked_for_times_the_steps(clock, monkeypatch):
    asked = []
    for name in CLOCKS:
        monkeypatch.setitem(CLOCKS, name, lambda name=name: asked.append(name) or float(len(asked)))
    module.measure_point(POINT, replace(OPTIONS, clock=clock, threads=1), CPU)
    assert set(asked) == {clock}


def test_a_killed_stage_goes_on_where_it_was(tmp_path, monkeypatch):
    real, measured = module.measure_point, []
    stage = Stage(tmp_path / "a.json", "cost_curves", tmp_path / "kept", progress=False)

    def once(point, options, device):
        measured.append(point)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(point, options, device)

    monkeypatch.setattr(module, "measure_point", once)
    with pytest.raises(KeyboardInterrupt):
        cost_curves(OPTIONS, stage)
    assert not (tmp_path / "a.json").exists()
    cost_curves(OPTIONS, stage)
    assert len(measured) == 6 and measured[2] == measured[3]


@pytest.mark.skipif(not RECORD.is_file(), reason=f"{RECORD} is not there: make repro EXPERIMENT=local")
def test_the_committed_record_is_found_again(compose, tmp_path, monkeypatch):
    """On its machine, with its torch: by its hash. Operations are by the same formulas."""
    record = json.loads(shutil.copy(RECORD, tmp_path / "cost_curves.json").read_text())
    monkeypatch.setattr(machine, "facts", lambda device: record["device"])
    monkeypatch.setattr(torch, "__version__", record["provenance"]["packages"]["torch"])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: record["device"]["threads"])
    config = compose("scale=cost_curves/local", config_name="cost_curves")
    assert cost_curves(read_config(config), Stage(tmp_path / "cost_curves.json", "cost_curves")) == record
    for point in record["points"]:
        for name, variant in point["variants"].items():
            # The folded form was measured when layers were stepped one by one, in the rows and columns they touched.
            assert name == "folded" or step_flop(name, Point(**point["point"]), CPU) == variant["flop"]
