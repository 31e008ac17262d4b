"""What a run writes: one caller a run, unwritable places found before training, nothing of a kill left behind."""

import os

import pytest

from finetune.runs import cells
from finetune.runs.cells import run_by_hand, search_cell, train_cell
from finetune.runs.preliminary import basis_cell, gradients_cell
from finetune.runs.problem import Run
from finetune.store import places

SMALL = ("method=full", "learning_rate=0.001")
SEARCH = ("method=full", "learning_rate=null", "scale.search.trials=1")


@pytest.fixture
def by_hand(config):
    """``by_hand(output=...)``: the configuration of a run by hand."""
    return lambda **entries: config(*SMALL) | entries


@pytest.mark.parametrize("blocked", ["output", "checkpoints"])
def test_a_file_in_the_way_is_found_before_training(blocked, by_hand, trained, tmp_path):
    (tmp_path / "blocked").write_text("x")
    with pytest.raises(OSError, match="blocked"):
        run_by_hand(by_hand(**{blocked: str(tmp_path / "blocked" / "here")}))
    assert not trained and (tmp_path / "blocked").read_text() == "x"


def test_what_stands_where_record_and_model_shall_be_is_found_before_training(once, trained, tmp_path):
    (tmp_path / "a.json").mkdir()
    (tmp_path / "model").write_text("x")
    with pytest.raises(IsADirectoryError, match="a.json"):
        once(*SMALL, path=tmp_path / "a.json")
    with pytest.raises(NotADirectoryError, match="model"):
        once(*SMALL, path=tmp_path / "b.json", keep=tmp_path / "model")
    assert not trained and not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("call", [train_cell, search_cell, gradients_cell, basis_cell])
def test_a_folder_that_takes_no_file_is_found_before_a_cell_begins(call, cell_of, trained, tmp_path, monkeypatch):
    cell = cell_of(*SEARCH, tasks=["cola"], seeds=[1])
    for kind in ("models", "gradients", "basis"):
        (tmp_path / kind).write_text("x")
    with pytest.raises(OSError, match="models|gradients|basis"):
        call(cell)
    assert not trained


@pytest.mark.parametrize("call", [train_cell, search_cell, gradients_cell, basis_cell])
def test_a_second_caller_is_refused_at_once(call, cell_of, trained):
    cell = cell_of(*SEARCH, tasks=["cola"], seeds=[1])
    held = {gradients_cell: cell.shared("gradients"), basis_cell: cell.shared("basis")}.get(call, cell.folder("runs"))
    with (
        places.locked(held, cell.problem.config["checkpoints"]),
        pytest.raises(places.Busy, match=r"another process is working on it; wait for it, or end it\."),
    ):
        call(cell)
    assert not trained


def test_one_run_has_one_caller_wherever_its_record_goes(by_hand, trained, tmp_path):
    given = by_hand()
    problem = cells.make_problem(given)
    folder = problem.checkpoints(Run("cola", given["seed"], problem.hyperparameters()))
    with places.locked(folder, folder.parent), pytest.raises(places.Busy, match="another process is working on it"):
        run_by_hand(given | {"output": str(tmp_path / "elsewhere")})
    assert not trained
    run_by_hand(given)
    assert len(trained) == 1 and not list((tmp_path / "checkpoints").iterdir())


def test_what_a_kill_left_of_a_finished_run_goes_at_the_next_start(by_hand, trained, tmp_path):
    """Checkpoints half removed, a record and a whole model of a step that was not finished, locks of a dead process."""
    given = by_hand()
    run_by_hand(given)
    (record,) = (tmp_path / "output").rglob("cola-*.json")
    digest = record.stem.rsplit("-", 1)[1]
    half = tmp_path / "checkpoints" / digest / "step_00000006"
    half.mkdir(parents=True)
    (half / "state.json").write_text("{}")
    run_by_hand(given)
    assert len(trained) == 1 and not list((tmp_path / "checkpoints").iterdir())
    record.rename(record.with_name(f".{record.name}.k3_9a0xz"))
    (half.parent / ".step_00000003").mkdir(parents=True)
    run_by_hand(given)
    assert len(trained) == 2 and not list((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in record.parent.iterdir()] == [record.name]


def test_a_model_that_a_kill_left_half_written_goes_before_the_next_one_is_trained(once, tmp_path, monkeypatch):
    (tmp_path / "models" / ".seed1.k3_9a0xz").mkdir(parents=True)
    (tmp_path / "models" / ".seed2.k3_9a0xz").mkdir()
    seen = []

    def train(training):
        seen.extend(sorted(os.listdir(tmp_path / "models")))
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.runs.run.train", train)
    with pytest.raises(KeyboardInterrupt):
        once(*SMALL, keep=tmp_path / "models" / "seed1")
    assert seen == [".seed2.k3_9a0xz"]
