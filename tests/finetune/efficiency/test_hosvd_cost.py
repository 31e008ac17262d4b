"""Cost of HOSVD: each way finds the planted subspace, is measured alone; what is not run is said and calculated."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from finetune.efficiency import hosvd_cost as module
from finetune.efficiency import hosvd_ways, machine
from finetune.efficiency.hosvd_cost import Case, HosvdOptions, hosvd_cost, read_config, summary
from finetune.efficiency.hosvd_ways import WAYS, Gradients, angle, flop, measure, peak_bytes, run
from finetune.efficiency.stage import Stage

CPU = torch.device("cpu")
RECORD = Path(__file__).parents[3] / "results/local/hosvd_cost.json"
OPTIONS = HosvdOptions(rank=3, noise=1e-3, limit_bytes=1e9, limit_seconds=120, device="cpu", threads=1)


@pytest.fixture
def gradients():
    return Gradients((24, 10), 3, 1e-3, 0, CPU)


def case(**ways):
    return Case("tiny", (24, 10), 12, ways)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "hosvd.json", "hosvd_cost", tmp_path / "kept", progress=False)


@pytest.fixture
def here(monkeypatch):
    """Ways run in this process: one of its own is for the memory alone."""
    monkeypatch.setattr(module, "_run_alone", lambda asked, path, _: hosvd_ways.main(json.dumps(asked), path))


# ---- the ways ----


def test_gradients_are_the_same_in_any_order_and_differ_from_each_other(gradients):
    planted = gradients.planted
    first = [gradients.gradient(number) for number in range(3)]
    again = replace(gradients).gradient(1)
    assert torch.equal(first[1], again) and not torch.equal(first[0], first[1])
    assert first[0].shape == (24, 10) and first[0].dtype == torch.float32
    rest = first[0] - planted.V.T @ planted.V @ first[0] @ planted.U.T @ planted.U
    assert 0 < rest.std() < 2e-3 < first[0].std()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_the_planted_subspace_and_the_same_one(way, gradients):
    reference, found = run("streaming", gradients, 12)[0], run(way, gradients, 12)[0]
    planted = gradients.planted
    for name in ("U", "V"):
        leading = getattr(found, name)[:3]
        assert angle(leading, getattr(reference, name)[:3]) < 1e-5
        assert angle(leading, getattr(planted, name)) < 0.02
        assert angle(getattr(found, name)[3:6], getattr(planted, name)) > 1.5


def test_angle_of_a_known_rotation():
    P = torch.tensor([[1.0, 0.0, 0.0]])
    for expected in (0.0, 1e-10, 0.3, math.pi / 2):
        Q = torch.tensor([[math.cos(expected), math.sin(expected), 0.0]], dtype=torch.float64)
        assert angle(P, Q) == pytest.approx(expected, rel=1e-6, abs=1e-16)


def test_operations_and_bytes_grow_as_they_should():
    shape = (3072, 768)
    assert flop("streaming", shape, 360)["updates"] == 2 * 360 * 3072 * 768 * (3072 + 768)
    assert peak_bytes("streaming", shape, 30) == peak_bytes("streaming", shape, 360)
    for way in WAYS[1:]:
        more = peak_bytes(way, shape, 360) - peak_bytes(way, shape, 180)
        assert more / (180 * 3072 * 768) == {"unfoldings": 36, "unfoldings_float32": 12, "tensorly": 44}[way]
        assert sum(flop(way, shape, 360).values()) < 2 * sum(flop(way, shape, 180).values())


@pytest.mark.parametrize("way", WAYS)
def test_bytes_by_formula_hold_the_tensors_that_a_way_has_at_once(way, gradients, tmp_path):
    """Counted by torch's profiler: LAPACK's work spaces, which the formula has too, are not among them."""
    gradients = replace(gradients, shape=(96, 64))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(way, gradients, 12)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = max(itertools.accumulate(size for _, size in changes))
    assert 0.4 < held / peak_bytes(way, (96, 64), 12) < 1.15


def test_a_measurement_says_seconds_bytes_and_angles(gradients):
    request = {"way": "streaming", "shape": [24, 10], "gradients": 5, "rank": 3, "noise": 1e-3, "seed": 0}
    found, basis = measure(request | {"device": "cpu", "threads": None})
    assert basis.U.shape == (3, 10) and basis.V.shape == (3, 24) and found["peak_bytes"] >= 0
    assert found["seconds"]["total"] == found["seconds"]["updates"] + found["seconds"]["factors"]
    assert set(found["seconds"]) == {"updates", "factors", "total"} and "VmHWM" in found["measured_by"]
    assert max(found["angle_to_planted"].values()) < 0.02


def test_time_on_the_cpu_is_not_the_clocks(gradients, monkeypatch):
    """Waiting, as beside other processes, is in the clock's seconds alone."""
    clock, cpu = itertools.count(), itertools.count(step=0.25)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("time.process_time", lambda: next(cpu))
    assert run("unfoldings_float32", gradients, 3)[1] == {"factors": 2, "cpu": 0.5}


# ---- the record ----


def test_a_record_holds_every_way_and_is_reused(stage, here, tmp_path):
    ways = {way: [12] for way in WAYS}
    found = hosvd_cost([case(**ways)], OPTIONS, stage)
    assert json.loads(stage.path.read_text()) == found and list((tmp_path / "kept").iterdir()) == []
    [one] = found["cases"]
    assert [entry["way"] for entry in one["entries"]] == list(WAYS)
    assert all(e["status"] == "finished" and e["seconds"]["total"] > 0 for e in one["entries"])
    for entry in one["entries"][1:]:
        assert max(entry["angle_to_streaming"].values()) < 1e-5
    ratio = one["ratios"]["unfoldings, 12 gradients"]
    seconds = {e["way"]: e["seconds"]["total"] for e in one["entries"]}
    cpu = {e["way"]: e["cpu_seconds"] for e in one["entries"]}
    assert ratio["cpu_time"] == cpu["streaming"] / cpu["unfoldings"] > 0
    assert ratio["from"] == "measured" and ratio["time"] == seconds["streaming"] / seconds["unfoldings"]
    before = stage.path.read_bytes()
    hosvd_cost([case(**ways)], OPTIONS, stage)
    assert stage.path.read_bytes() == before
    assert any("streaming / tensorly, 12 gradients: time" in line for line in summary(found))


def test_a_killed_stage_goes_on_where_it_was(stage, tmp_path, monkeypatch):
    real, started = module._run_alone, []

    def once(request, answer, limit):
        started.append(request["way"])
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(request, answer, limit)

    monkeypatch.setattr(module, "_run_alone", once)
    arguments = ([case(streaming=[12], unfoldings=[12])], OPTIONS, stage)
    with pytest.raises(KeyboardInterrupt):
        hosvd_cost(*arguments)
    assert not (tmp_path / "hosvd.json").exists()
    found = hosvd_cost(*arguments)
    assert started == ["streaming", "unfoldings", "unfoldings"]
    assert "angle_to_streaming" in found["cases"][0]["entries"][1]


def test_what_does_not_fit_is_said_and_calculated_from_what_did(stage, here):
    limit = peak_bytes("unfoldings", (24, 10), 6)
    cases = [case(streaming=[6, 12], unfoldings=[6, 12], tensorly=[])]
    found = hosvd_cost(cases, replace(OPTIONS, limit_bytes=limit), stage)
    entries = {(e["way"], e["gradients"]): e for e in found["cases"][0]["entries"]}
    left = entries["unfoldings", 12]
    assert left["status"] == "not run" and "GB by formula, allowed here are" in left["reason"]
    less = entries["unfoldings", 6]
    grown = left["calculated"]["flop"] / less["calculated"]["flop"]
    assert left["calculated"]["seconds"] == pytest.approx(less["seconds"]["total"] * grown)
    assert left["calculated"]["bytes"] == peak_bytes("unfoldings", (24, 10), 12)
    assert entries["tensorly", 12]["calculated"]["seconds"] is None
    ratios = found["cases"][0]["ratios"]
    assert ratios["unfoldings, 12 gradients"]["from"] == "calculated where not measured"
    assert ratios["unfoldings, 12 gradients"]["cpu_time"] is None
    assert ratios["unfoldings, 6 gradients"]["from"] == "measured"
    assert any("not run: needs" in line for line in summary(found))


def test_what_takes_too_long_is_stopped_and_said(stage):
    options = replace(OPTIONS, limit_seconds=0.05)
    found = hosvd_cost([case(streaming=[12])], options, stage)
    [entry] = found["cases"][0]["entries"]
    assert entry["status"] == "stopped" and "longer than 0.05 s" in entry["reason"] and "seconds" not in entry


def test_a_process_that_the_system_ends_is_said(stage, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/sh")
    monkeypatch.setattr(module, "WORKER", ["-c", "kill -9 $$"])
    found = hosvd_cost([case(streaming=[12])], OPTIONS, stage)
    assert found["cases"][0]["entries"][0]["reason"] == "the process was ended by signal 9"


def test_a_refused_request_is_an_error(stage):
    with pytest.raises(ValueError, match="streaming, 12 gradients: .*rank=11 of gradients of shape"):
        hosvd_cost([case(streaming=[12])], replace(OPTIONS, rank=11), stage)


@pytest.mark.skipif(not RECORD.is_file(), reason=f"{RECORD} is not there: make repro EXPERIMENT=local")
def test_the_committed_record_is_found_again(compose, tmp_path, monkeypatch):
    """On its machine, with its torch: by the hash of today's configuration."""
    record = json.loads(shutil.copy(RECORD, tmp_path / "hosvd_cost.json").read_text())
    monkeypatch.setattr(machine, "facts", lambda device: record["device"])
    monkeypatch.setattr(torch, "__version__", record["provenance"]["packages"]["torch"])
    config = compose("scale=hosvd_cost/local", config_name="hosvd_cost")
    assert hosvd_cost(*read_config(config), Stage(tmp_path / "hosvd_cost.json", "hosvd_cost")) == record
