"""The search: a total that reruns keep to, kills that lose nothing, points that are tried once."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import optuna
import pytest
from optuna.trial import TrialState

from finetune.runs.search import SearchSpace, finished, run_search, summary
from finetune.runs.search_journal import open_storage
from finetune.runs.search_space import is_whole
from finetune.training.loop import NonFiniteLoss

POINTS = ({"learning_rate": 1e-3, "batch_size": 8}, {"learning_rate": 1e-2, "batch_size": 16})


@pytest.fixture
def space():
    """``space(trials=6, ...)``."""

    def make(**changes):
        values = {"learning_rate": (1e-5, 1e-1), "batch_sizes": (8, 16), "trials": 6, "startup_trials": 100, "seed": 34}
        return SearchSpace(**values | changes)

    return make


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "search.journal")


def value(point):
    """A score with one maximum, at 3e-3 and 16."""
    return -abs(math.log(point["learning_rate"] / 3e-3)) + point["batch_size"] / 100


class Objective:
    """Notes what it is asked, in order; ends like a killed process when asked for the n-th time."""

    def __init__(self, dies_at=None):
        self.asked, self.dies_at = [], dies_at

    def __call__(self, point, report):
        self.asked.append(dict(point))
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt  # no Exception: nothing is told to the study, as in a kill
        report(1, value(point))
        return value(point)


def points(study):
    """Points of the trials that count, in the order of their numbers."""
    return [trial.params for trial in sorted(finished(study), key=lambda t: t.number)]


def test_finds_the_better_half(space, storage):
    study = run_search(Objective(), space(trials=25), storage, "a")
    best = summary(study, space(trials=25))["best"]
    assert 3e-4 < best["learning_rate"] < 3e-2 and best["batch_size"] == 16


def test_same_seed_asks_the_same_points_and_another_seed_others(space, tmp_path):
    asked = []
    for name, seed in (("a", 34), ("b", 34), ("c", 35)):
        objective = Objective()
        run_search(objective, space(seed=seed), open_storage(tmp_path / name), "study")
        asked.append(objective.asked)
    assert asked[0] == asked[1] != asked[2]
    assert len({point["learning_rate"] for point in asked[0]}) == 6


def test_total_and_order_are_kept_over_restarts_and_points_are_tried_first_and_once(space, storage, tmp_path):
    objective = Objective()
    for trials in (1, 1, 3, 3, 7):
        study = run_search(objective, space(trials=trials, points=POINTS), storage, "a")
        assert len(objective.asked) == trials == len(finished(study))
    assert (
        len(study.trials) == 7
        and objective.asked[:2] == list(POINTS)
        and all(objective.asked.count(point) == 1 for point in POINTS)
    )
    whole = run_search(Objective(), space(trials=7, points=POINTS), open_storage(tmp_path / "a" / "whole"), "a")
    assert points(study) == points(whole)
    run_search(objective, space(trials=2), storage, "b")  # another configuration is another search
    assert len(objective.asked) == 9


@pytest.mark.parametrize("given", [(), POINTS])
@pytest.mark.parametrize("kills", [(1,), (2,), (3, 1), (7, 1, 2), (9,)])
def test_killed_search_asks_what_an_unbroken_one_asks(kills, given, space, tmp_path):
    whole = run_search(Objective(), space(trials=10, points=given), open_storage(tmp_path / "whole"), "a")
    asked = []
    for dies_at in kills:
        objective = Objective(dies_at)
        with pytest.raises(KeyboardInterrupt):
            run_search(objective, space(trials=10, points=given), open_storage(tmp_path / "broken"), "a")
        asked += objective.asked[:-1]
    objective = Objective()
    study = run_search(objective, space(trials=10, points=given), open_storage(tmp_path / "broken"), "a")
    asked += objective.asked
    assert points(study) == points(whole)
    assert len(asked) == 10  # no finished trial was done again
    assert not [t for t in study.trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]


def test_values_reported_before_a_kill_are_kept_and_reported_once(space, storage):
    def objective(point, report):
        report(10, 0.1)
        if not killed:
            killed.append(point)
            raise KeyboardInterrupt
        report(20, 0.2)
        return 0.2

    killed = []
    with pytest.raises(KeyboardInterrupt):
        run_search(objective, space(trials=1), storage, "a")
    study = run_search(objective, space(trials=1), storage, "a")
    assert [trial.intermediate_values for trial in study.trials] == [{10: 0.1, 20: 0.2}]
    assert study.trials[0].params == killed[0]


KILLED = """
    import os, signal, sys
    from finetune.runs.search import SearchSpace, run_search
    from finetune.runs.search_journal import open_storage

    asked = []

    def objective(point, report):
        asked.append(point)
        if len(asked) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return point["learning_rate"]

    space = SearchSpace((1e-5, 1e-1), (8, 16), 5, seed=34)
    study = run_search(objective, space, open_storage(sys.argv[1]), "a")
"""


def test_search_outlives_sigkill(tmp_path, space):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))
    journal = tmp_path / "journal"
    done = subprocess.run(
        [sys.executable, script, journal, "3"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = optuna.load_study(study_name="a", storage=open_storage(journal))
    assert [t.state for t in left.trials] == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING]
    interrupted = left.trials[-1].params
    objective = Objective()
    study = run_search(objective, space(trials=5), open_storage(journal), "a")
    assert len(objective.asked) == 3 and objective.asked[0] == interrupted
    assert len(finished(study)) == 5
    assert sorted(os.listdir(tmp_path)) == ["journal", "script.py"]  # no lock is left behind


def test_pruned_and_diverged_trials_count(space, storage):
    asked = []

    def objective(point, report):
        asked.append(point)
        if len(asked) == 2:
            raise NonFiniteLoss("loss is nan at step 3")
        report(1, -float(len(asked)))
        return -float(len(asked))

    study = run_search(objective, space(trials=6, startup_trials=1), storage, "a")
    assert len(asked) == 6
    result = summary(study, space(trials=6))
    states = [trial["state"] for trial in result["trials"]]
    assert states[:2] == ["complete", "diverged"] and "pruned" in states[2:]
    assert result["best"]["trial"] == 0 and result["n_trials"] == 6


@pytest.mark.parametrize(("warmup", "reported"), [(0, [10]), (15, [10, 20])])
def test_pruned_trials_keep_what_they_reported_and_warmup_steps_are_not_pruned(warmup, reported, space, storage):
    asked = []

    def objective(point, report):
        asked.append(point)
        for step in (10, 20):
            report(step, -float(len(asked)))
        return -float(len(asked))

    study = run_search(objective, space(trials=3, startup_trials=1, warmup_steps=warmup), storage, "a")
    result = json.loads(json.dumps(summary(study, space(trials=3)), allow_nan=False))
    assert [list(map(int, trial["intermediate"])) for trial in result["trials"]] == [[10, 20], reported, reported]
    assert result["trials"][0]["intermediate"] == {"10": -1.0, "20": -1.0} and result["trials"][1]["value"] is None
    assert set(result["trials"][0]) >= {"number", "state", "value", "learning_rate", "batch_size", "seconds"}
    assert set(result["best"]) == {"learning_rate", "batch_size", "value", "trial"}


def test_no_trial_completed(space, storage):
    def objective(point, report):
        raise NonFiniteLoss("loss is inf at step 1")

    study = run_search(objective, space(trials=3), storage, "a")
    with pytest.raises(ValueError, match=r"no trial of 3 completed \(pruned or diverged\): lower search.learning_rate"):
        summary(study, space(trials=3))


def test_error_of_the_objective_is_raised_and_its_point_tried_again(space, storage):
    def objective(point, report):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_search(objective, space(trials=2, points=POINTS), storage, "a")
    again = Objective()
    study = run_search(again, space(trials=2, points=POINTS), storage, "a")
    assert sorted(map(str, again.asked)) == sorted(map(str, POINTS))
    assert len(finished(study)) == 2


def test_ties_go_to_the_lower_loss_then_to_the_earlier_trial(space, storage):
    losses = iter([0.5, 0.3, 0.3, 0.9])
    study = run_search(lambda point, report: (1.0, next(losses)), space(trials=4), storage, "a")
    result = summary(study, space(trials=4))
    assert result["best"]["trial"] == 1
    assert [trial["validation_loss"] for trial in result["trials"]] == [0.5, 0.3, 0.3, 0.9]


def test_best_at_the_edge_of_what_was_tried_is_marked(space, storage):
    rates = run_search(lambda point, report: point["learning_rate"], space(trials=4), storage, "edge")
    assert summary(rates, space(trials=4))["best_is_at_edge"] is True
    given = tuple({"learning_rate": rate, "batch_size": 8} for rate in (1e-4, 3e-3, 1e-2))
    middle = run_search(lambda point, report: value(point), space(trials=3, points=given), storage, "middle")
    assert summary(middle, space(trials=3))["best_is_at_edge"] is False


# Grids that are extended at their edge


GRID = tuple({"learning_rate": rate, "batch_size": 8} for rate in (1e-4, 3e-4, 1e-3))


def peak(rate):
    """An objective with its maximum at a learning rate."""
    return lambda point, report: -abs(math.log(point["learning_rate"] / rate))


@pytest.mark.parametrize(
    ("best", "extend", "added", "at_edge"),
    [
        (3e-4, 2, [], False),
        (1e-3, 2, [0.00333333], False),
        (1.0, 2, [0.00333333, 0.0111111], True),
        (1e-4, 2, [3.33333e-05], False),
        (1e-9, 9, [3.33333e-05, 1.11111e-05], True),  # the bounds end at 1e-5
        (1.0, 0, [], True),
    ],
)
def test_a_grid_is_extended_while_its_edge_is_best(best, extend, added, at_edge, space, storage):
    grid = space(trials=3, points=GRID, extend=extend)
    found = summary(run_search(peak(best), grid, storage, "a"), grid)
    assert [trial["learning_rate"] for trial in found["trials"]] == [1e-4, 3e-4, 1e-3, *added]
    assert {trial["batch_size"] for trial in found["trials"]} == {8}
    assert (found["n_trials"], found["best_is_at_edge"]) == (3 + len(added), at_edge)
    assert found.get("extended", 0) == len(added) and ("extended" in found) == (extend > 0)
    assert is_whole(found, grid)
    more = space(trials=3, points=GRID, extend=extend + 1)
    assert is_whole(found, more) == (not at_edge or extend == 9)
    assert is_whole(found, space(trials=3, points=GRID)) == (not added) and not is_whole(found, space(trials=4))


def test_a_diverged_edge_is_tried_and_not_gone_beyond(space, storage):
    def objective(point, report):
        if point["learning_rate"] > 1e-3:
            raise NonFiniteLoss("loss is nan at step 1")
        return point["learning_rate"]

    grid = space(trials=3, points=GRID, extend=3)
    found = summary(run_search(objective, grid, storage, "a"), grid)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3 + ["diverged"]
    assert (found["extended"], found["best"]["learning_rate"], found["best_is_at_edge"]) == (1, 1e-3, False)


@pytest.mark.parametrize("dies_at", [1, 3, 4, 5])
def test_a_killed_extension_goes_on_to_the_same_trials(dies_at, space, tmp_path):
    grid, asked = space(trials=3, points=GRID, extend=2), []

    def objective(point, report):
        asked.append(point)
        if len(asked) == dies_at:
            raise KeyboardInterrupt
        return point["learning_rate"]

    with pytest.raises(KeyboardInterrupt):
        run_search(objective, grid, open_storage(tmp_path / "broken"), "a")
    study = run_search(objective, grid, open_storage(tmp_path / "broken"), "a")
    whole = run_search(peak(1.0), grid, open_storage(tmp_path / "whole"), "a")
    assert points(study) == points(whole) and len(asked) == 6
    assert summary(study, grid)["extended"] == 2


def test_each_method_has_points_of_its_own_and_a_variant_its_bases():
    given = {"full": [1e-5, 3e-5], "lora": [{"learning_rate": 1e-3, "batch_size": 8}, 2e-3], "sparsegrad": [1e-4, 1e-3]}
    config = {
        "protocol": {"search": {"learning_rate": [1e-6, 0.1], "batch_sizes": [8, 16]}, "search_seed": 34},
        "scale": {
            "batch_size": 16,
            "search": {"trials": 2, "points": given, "extend": 1, "pruning": {"startup_trials": 5, "warmup_steps": 1}},
        },
    }
    found = {
        name: SearchSpace.of(config | {"method": method})
        for name, method in {
            "full": {"name": "full"},
            "lora": {"name": "lora"},
            "own": {"name": "sparsegrad", "base": "full"},
            "variant": {"name": "truncated", "base": "sparsegrad"},
        }.items()
    }
    pairs = {name: [tuple(point.values()) for point in space.points] for name, space in found.items()}
    assert pairs["full"] == [(1e-5, 16), (3e-5, 16)] and pairs["lora"] == [(1e-3, 8), (2e-3, 16)]
    assert pairs["own"] == pairs["variant"] == [(1e-4, 16), (1e-3, 16)] and found["full"].extend == 1
    with pytest.raises(ValueError, match="points is given for full, lora, sparsegrad; method=meprop needs one too"):
        SearchSpace.of(config | {"method": {"name": "meprop"}})


def test_optunas_verbosity_is_left_as_it_was(space, storage):
    before = optuna.logging.get_verbosity()
    run_search(Objective(), space(trials=1), storage, "a")
    with pytest.raises(KeyboardInterrupt):
        run_search(Objective(dies_at=1), space(trials=2), storage, "a")
    assert optuna.logging.get_verbosity() == before
