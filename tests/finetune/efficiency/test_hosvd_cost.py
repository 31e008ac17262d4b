"""Cost of HOSVD: each way finds the planted subspace, is measured alone; what is not run is said and calculated."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from finetune.efficiency import hosvd_cost as module
from finetune.efficiency.hosvd_cost import Case, HosvdOptions, hosvd_cost, summary
from finetune.efficiency.hosvd_ways import WAYS, Gradients, angle, flop, peak_bytes, run
from finetune.efficiency.hosvd_worker import measure

CPU = torch.device("cpu")
OPTIONS = HosvdOptions(rank=3, noise=1e-3, limit_bytes=1e9, limit_seconds=120, device="cpu", threads=1)


@pytest.fixture
def gradients():
    return Gradients((24, 10), 3, 1e-3, 0, CPU)


def case(**ways):
    return Case("tiny", (24, 10), 12, ways)


# ---- the ways ----


def test_gradients_are_the_same_in_any_order_and_differ_from_each_other(gradients):
    planted = gradients.planted()
    first = [gradients.gradient(number, planted) for number in range(3)]
    again = gradients.gradient(1, gradients.planted())
    assert torch.equal(first[1], again) and not torch.equal(first[0], first[1])
    assert first[0].shape == (24, 10) and first[0].dtype == torch.float32
    rest = first[0] - planted.V.T @ planted.V @ first[0] @ planted.U.T @ planted.U
    assert 0 < rest.std() < 2e-3 < first[0].std()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_the_planted_subspace_and_the_same_one(way, gradients):
    reference, found = run("streaming", gradients, 12)[0], run(way, gradients, 12)[0]
    planted = gradients.planted()
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
def test_bytes_by_formula_are_near_those_of_the_process(way, tmp_path):
    """At a size where the libraries' own buffers, some 10 MB that no formula has, matter little."""
    options = replace(OPTIONS, limit_bytes=None)
    tiny = Case("tiny", (1024, 256), 12, {way: [12]})
    found = hosvd_cost([tiny], options, tmp_path / "a.json", tmp_path / "c", progress=False)
    [entry] = found["cases"][0]["entries"]
    assert 0.7 < entry["calculated"]["bytes_over_measured"] < 1.3


def test_the_worker_counts_what_is_held_and_freed_again(monkeypatch):
    """A way that holds 64 MB for a moment is seen to, though no allocator of torch is asked."""

    def holds(way, gradients, n):
        if n > 3:
            bytearray(b"\1") * 64_000_000
        return run(way, gradients, n)

    monkeypatch.setattr("finetune.efficiency.hosvd_worker.run", holds)
    request = {"way": "streaming", "shape": [24, 10], "gradients": 5, "rank": 3, "noise": 1e-3, "seed": 0}
    found, basis = measure(request | {"device": "cpu", "threads": None})
    assert found["peak_bytes"] >= 60e6 and basis.U.shape == (3, 10) and basis.V.shape == (3, 24)
    assert found["seconds"]["total"] == found["seconds"]["updates"] + found["seconds"]["factors"] > 0
    assert set(found["seconds"]) == {"updates", "factors", "total"} and found["cpu_seconds"] > 0


def test_time_on_the_cpu_is_not_the_clocks(gradients, monkeypatch):
    """Waiting, as beside other processes, is in the clock's seconds alone."""
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: (time.sleep(0.2), real(*args, **options))[1])
    seconds = run("unfoldings_float32", gradients, 3)[1]
    assert seconds["factors"] > 0.4 and seconds["cpu"] < 0.2


# ---- the record ----


def test_a_record_holds_every_way_and_is_reused(tmp_path):
    path, ways = tmp_path / "hosvd.json", {way: [12] for way in WAYS}
    found = hosvd_cost([case(**ways)], OPTIONS, path, tmp_path / "kept", progress=False)
    assert json.loads(path.read_text()) == found and list((tmp_path / "kept").iterdir()) == []
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
    before = path.read_bytes()
    hosvd_cost([case(**ways)], OPTIONS, path, tmp_path / "kept", progress=False)
    assert path.read_bytes() == before
    assert any("streaming / tensorly, 12 gradients: time" in line for line in summary(found))


def test_a_killed_stage_goes_on_where_it_was(tmp_path, monkeypatch):
    real, started = module._run_worker, []

    def once(request, answer, limit):
        started.append(request["way"])
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(request, answer, limit)

    monkeypatch.setattr(module, "_run_worker", once)
    arguments = ([case(streaming=[12], unfoldings=[12])], OPTIONS, tmp_path / "hosvd.json", tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        hosvd_cost(*arguments, progress=False)
    assert not (tmp_path / "hosvd.json").exists()
    found = hosvd_cost(*arguments, progress=False)
    assert started == ["streaming", "unfoldings", "unfoldings"]
    assert "angle_to_streaming" in found["cases"][0]["entries"][1]


def test_what_does_not_fit_is_said_and_calculated_from_what_did(tmp_path):
    limit = peak_bytes("unfoldings", (24, 10), 6)
    cases = [case(streaming=[6, 12], unfoldings=[6, 12], tensorly=[])]
    found = hosvd_cost(cases, replace(OPTIONS, limit_bytes=limit), tmp_path / "a.json", tmp_path / "c", progress=False)
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


def test_what_takes_too_long_is_stopped_and_said(tmp_path):
    options = replace(OPTIONS, limit_seconds=0.05)
    found = hosvd_cost([case(streaming=[12])], options, tmp_path / "a.json", tmp_path / "c", progress=False)
    [entry] = found["cases"][0]["entries"]
    assert entry["status"] == "stopped" and "longer than 0.05 s" in entry["reason"] and "seconds" not in entry


def test_a_process_that_the_system_ends_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/sh")
    monkeypatch.setattr(module, "WORKER", ["-c", "kill -9 $$"])
    found = hosvd_cost([case(streaming=[12])], OPTIONS, tmp_path / "a.json", tmp_path / "c", progress=False)
    assert found["cases"][0]["entries"][0]["reason"] == "the process was ended by signal 9"


def test_a_refused_request_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="streaming, 12 gradients: .*rank=11 of gradients of shape"):
        hosvd_cost(
            [case(streaming=[12])], replace(OPTIONS, rank=11), tmp_path / "a.json", tmp_path / "c", progress=False
        )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ways": {"nope": [1]}}, r"ways \['nope'\]; allowed: streaming"),
        ({"ways": {}}, "allowed: streaming"),
        ({"ways": {"streaming": [0]}}, "whole, at least 1"),
        ({"asked": 1.5}, "whole, at least 1"),
        ({"shape": (3,)}, r"shape \(3,\)"),
    ],
)
def test_wrong_cases_are_refused(changes, text):
    given = {"name": "tiny", "shape": (24, 10), "asked": 3, "ways": {"streaming": [3]}}
    with pytest.raises(ValueError, match=text):
        Case(**given | changes)
