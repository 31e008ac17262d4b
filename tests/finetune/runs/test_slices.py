"""Slices: the same records as in one go, the most telling first; what another process has, and what fails, is left."""

import time
from pathlib import Path

import pytest
import torch
import yaml

from finetune.runs import cells, slices
from finetune.runs import run as running
from finetune.runs.cells import in_order, train_cell
from finetune.runs.slices import run_slice
from finetune.store import places, records
from finetune.store.experiment import write_params
from finetune.training import loop

ROOT = Path(__file__).parents[3]

SEARCHED = (
    "scale.search.max_steps=4", "scale.evaluation_steps=2", "learning_rate=null", "batch_size=null",
    "scale.search.points=[{learning_rate: 0.001, batch_size: 8}, {learning_rate: 0.01, batch_size: 8}]",
    "scale.search.trials=2",
)  # fmt: skip


@pytest.fixture
def experiment(cell_of):
    """``experiment("full", "lora")``: cells of two tasks and two seeds each, with searches."""

    def make(*methods, **others):
        given = {"tasks": ["cola", "mrpc"], **others}
        return [cell_of(f"method={method}", *SEARCHED, **given) for method in methods]

    return make


def test_breadth_comes_before_depth(experiment, cell_of):
    """For each task the searches of all methods, then a seed of all; then the next seed."""
    three = [*experiment("full", "lora"), cell_of("method=full", chat=True, seeds=[5])]
    found = [(three[0].problem, three[1].problem).index(work.problem) if work.problem is not three[2].problem else 2
             for work in in_order(three)]  # fmt: skip
    assert [(n, work.task, work.seed) for n, work in zip(found, in_order(three), strict=True)] == [
        (0, "cola", None), (1, "cola", None), (0, "cola", 1), (1, "cola", 1), (2, "oasst1", 5),
        (0, "mrpc", None), (1, "mrpc", None), (0, "mrpc", 1), (1, "mrpc", 1),
        (0, "cola", 2), (1, "cola", 2), (0, "mrpc", 2), (1, "mrpc", 2),
    ]  # fmt: skip


def test_slices_with_kills_between_give_the_records_of_one_go(
    experiment, read, numbers, clock, killed, trained, tmp_path
):
    def tiny():
        return experiment("full", "sparsegrad", seeds=[1])

    def files():
        return {path.relative_to(tmp_path) for kind in ("runs", "search") for path in (tmp_path / kind).rglob("*.*")}

    def results():
        found = {}
        for cell in tiny():
            found |= {(cell.problem.place, *key): numbers(record) for key, record in read(cell.folder("runs")).items()}
            for task in cell.tasks:
                search = records.read_record(cell.folder("search") / f"{task}.json")
                trials = [trial | {"seconds": 0} for trial in search["trials"]]
                found[cell.problem.place, task] = trials, search["best"], search["run"]["config_hash"]
        return found

    left, slices = 1, 0
    while left:
        slices += 1
        if slices in (3, 5):
            killed(2, lambda: run_slice(tiny()))
            continue
        clock(9)
        outcome = run_slice(tiny(), 0.0)
        left = len(outcome.left)
        assert outcome.over == (left > 0) and not outcome.failed()
    assert 5 < slices < 20 and not list((tmp_path / "checkpoints").glob("*"))
    sliced, there = results(), files()
    again = len(trained)
    outcome = run_slice(tiny())
    assert len(trained) == again and not outcome.over and len(outcome.works) == len(outcome.found) == 8
    for kind in ("runs", "search"):
        (tmp_path / kind).rename(tmp_path / f"sliced {kind}")
    for cell in tiny():
        train_cell(cell)
    assert results() == sliced and files() == there


def test_the_most_telling_runs_come_first_and_a_whole_cell_gets_its_list(experiment, trained, clock):
    (cell,) = experiment("full", tasks=["cola"], seeds=[2, 1])
    clock(21)
    outcome = run_slice([cell], 0.0)
    assert trained == [("cola", 34), ("cola", 34), ("cola", 2), ("cola", 1)] and outcome.over
    assert [work.seed for work in outcome.left] == [1] and not (cell.folder("runs") / "cell.json").exists()
    run_slice([cell])
    assert len(records.listed_records(cell.folder("runs") / "cell.json")) == 2


def test_a_cell_of_another_caller_is_left_to_it(experiment, trained, caplog):
    first, second = experiment("full", "lora", tasks=["cola"], seeds=[1])
    with first.writer():
        outcome = run_slice(experiment("full", "lora", tasks=["cola"], seeds=[1]))
        assert outcome.over and [work.problem.place.name for work in outcome.left] == ["full", "full"]
        assert "another process is working on it" in caplog.text and len(trained) == 3
        outcome = run_slice([first])
        assert outcome.over and len(outcome.left) == 2 and len(trained) == 3
    with places.locked(first.folder("runs"), first.problem.config["checkpoints"]), pytest.raises(places.Busy):
        train_cell(first)
    assert not run_slice([first, second]).over and len(trained) == 6


@pytest.fixture
def out_of_memory(monkeypatch):
    """``out_of_memory((1, False))``: the device has no memory for runs of this seed (True: for trials of a search)."""
    prepare = cells.GlueProblem.prepare
    text = "CUDA out of memory. Tried to allocate 20.00 GiB."

    def make(*seeds):
        def fail(problem, method, model, device, seed):
            if seed in seeds:
                raise torch.OutOfMemoryError(text)
            return prepare(problem, method, model, device, seed)

        monkeypatch.setattr(cells.GlueProblem, "prepare", fail)
        return text

    return make


def test_a_run_without_memory_fails_alone_and_is_tried_again(cell_of, out_of_memory, read, numbers, tmp_path):
    cell = cell_of("method=full", seeds=[1, 2, 3])
    text = out_of_memory(2)
    with pytest.raises(ValueError, match=rf"1 of 3 searches and runs failed; cola-seed2-[0-9a-f]{{12}}.json: {text}"):
        train_cell(cell)
    found = read(cell.folder("runs"))
    assert {key[1]: record["status"] for key, record in found.items()} == {1: "finished", 2: "failed", 3: "finished"}
    assert found["cola", 2]["error"] == text and found["cola", 2]["score"] is None
    out_of_memory()
    train_cell(cell)
    again = read(cell.folder("runs"))
    assert {record["status"] for record in again.values()} == {"finished"}
    assert all(again["cola", seed] == found["cola", seed] for seed in (1, 3))


def test_memory_that_ends_in_a_step_leaves_the_checkpoint_for_the_next_try(once, monkeypatch, tmp_path, numbers):
    given = ("method=full", "scale.checkpoint_seconds=0")
    path = tmp_path / "tiny_bert" / "full" / "x.json"
    step, left = loop.Steps.step, iter(range(4))

    def fail(*arguments):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Steps, "step", fail)
        assert once(*given, path=path)["status"] == "failed"
    found = once(*given, path=path)
    assert found["status"] == "finished" and found["training"]["resumed"] == 1
    assert numbers(found) == numbers(once(*given))


def test_a_search_without_memory_fails_and_the_other_tasks_go_on(experiment, out_of_memory, trained, tmp_path):
    (cell,) = experiment("full", seeds=[1])
    text = out_of_memory(34)
    with pytest.raises(
        ValueError, match=rf"2 of 4 searches and runs failed; tiny_bert full search of cola: {text}; .* of mrpc"
    ):
        train_cell(cell)
    assert trained == [] and not list(cell.folder("search").glob("*.json"))
    assert run_slice([cell]).left and not (cell.folder("runs") / "cell.json").exists()
    out_of_memory()
    train_cell(cell)
    assert len(records.listed_records(cell.folder("runs") / "cell.json")) == 2


def test_memory_that_another_error_speaks_of_is_no_failed_run(once, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(running, "train", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        once("method=full", path=tmp_path / "tiny_bert" / "full" / "x.json")


# The command


def test_cells_are_composed_as_their_stages_call_the_script(compose, tmp_path):
    write_params(ROOT / "experiments" / "smoke.yaml", tmp_path / "params.yaml", ROOT / "conf")
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    train = {key: entry for key, entry in params["stages"]["train"].items() if entry["method"] == "truncated"}
    params["stages"]["train"] = train
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    found = slices.composed_cells(tmp_path / "params.yaml", ROOT)
    given = (f"cell={tmp_path}/params.yaml", "name=smoke", "workers=auto", "method=truncated")
    encoder = (
        "model=tiny_bert",
        "data=generated",
        "protocol=sound",
        "scale=smoke",
        "basis=results/smoke/basis/tiny_bert",
    )
    decoder = ("model=tiny_llama", "chat=generated_chat", "protocol=llama/sound", "scale=llama/smoke",
               "basis=results/smoke/basis/tiny_llama")  # fmt: skip
    assert found == [compose(*given, *encoder), compose(*given, *decoder, config_name="chat")]


@pytest.mark.parametrize(("seconds", "code", "whole"), [(60, 0, True), (60, 3, None), (3, 0, False)])
def test_dvc_is_ended_with_all_that_it_started_when_the_time_is_over(seconds, code, whole, tmp_path, monkeypatch):
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/bash\necho $@ > {tmp_path}/called\nsleep {60 if whole is False else 0}\nexit {code}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(slices.sys, "executable", str(stand_in))
    if whole is None:
        with pytest.raises(SystemExit, match="3"):
            slices._repro(time.time() + seconds, "basis")
    else:
        assert slices._repro(time.time() + seconds, "basis") is whole
    assert (tmp_path / "called").read_text() == "-m dvc repro basis\n"
