"""A grid without Optuna asks what Optuna's search asks, prunes what it prunes, and ends with the same summary."""

import math
import random

import pytest

from finetune.runs.grid import run_grid
from finetune.runs.search import run_search, summary
from finetune.runs.search_journal import open_storage
from finetune.runs.search_space import SearchSpace
from finetune.training.loop import NonFiniteLoss

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
POINTS = tuple({"learning_rate": rate, "batch_size": 16} for rate in RATES)


def space(**changes):
    values = {"learning_rate": (1e-5, 1.0), "batch_sizes": (8, 16), "trials": 5, "points": POINTS, "seed": 34}
    return SearchSpace(**values | {"startup_trials": 2, "warmup_steps": 20} | changes)


class Objective:
    """Three reports with a maximum at a rate; noise that each point has of its own; diverges above a rate."""

    def __init__(self, best, seed, above=1.0, dies_at=None):
        self.best, self.seed, self.above, self.dies_at, self.asked = best, seed, above, dies_at, []

    def __call__(self, point, report):
        self.asked.append(point["learning_rate"])
        if point["learning_rate"] > self.above:
            raise NonFiniteLoss("loss is nan")
        drawn = random.Random(f"{self.seed} {point}")
        for step in (10, 20, 30):
            score = round(-abs(math.log(point["learning_rate"] / self.best)) + drawn.random() * step / 10, 2)
            report(step, score)
            if len(self.asked) == self.dies_at:
                raise KeyboardInterrupt
        return score, drawn.choice([0.5, 0.6])


def without_times(found):
    return found | {"trials": [{k: v for k, v in trial.items() if k != "seconds"} for trial in found["trials"]]}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("best", "extend", "above"), [(1e-3, 0, 1.0), (1e-2, 3, 1.0), (1e-5, 2, 5e-3), (1e-4, 1, 2e-4)]
)
def test_it_is_the_search_of_optuna(best, extend, above, seed, tmp_path):
    ours, theirs = Objective(best, seed, above), Objective(best, seed, above)
    found = run_grid(ours, space(extend=extend), tmp_path / "a.jsonl", "a")
    study = run_search(theirs, space(extend=extend), open_storage(tmp_path / "a.journal"), "a")
    assert without_times(found) == without_times(summary(study, space(extend=extend))) and ours.asked == theirs.asked


def test_some_trials_are_pruned_and_extended(tmp_path):
    found = [run_grid(Objective(1e-2, s), space(extend=3), tmp_path / f"{s}.jsonl", "a") for s in range(8)]
    assert {trial["state"] for one in found for trial in one["trials"]} == {"complete", "pruned"}
    assert max(one["extended"] for one in found) > 0


@pytest.mark.parametrize("torn", [b"", b'0123456789abcdef {"number": 7, "st', b'0123456789abcdef {"number": 7}\n'])
@pytest.mark.parametrize("dies_at", [1, 3, 6])
def test_what_a_kill_leaves_goes_on(dies_at, torn, tmp_path):
    whole = run_grid(Objective(1e-2, 0), space(extend=2), tmp_path / "whole.jsonl", "a")
    killed, again, path = Objective(1e-2, 0, dies_at=dies_at), Objective(1e-2, 0), tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_grid(killed, space(extend=2), path, "a")
    path.write_bytes(path.read_bytes() + torn)
    assert without_times(run_grid(again, space(extend=2), path, "a")) == without_times(whole)
    assert killed.asked[:-1] + again.asked == [trial["learning_rate"] for trial in whole["trials"]]
    third = Objective(1e-2, 0)
    assert run_grid(third, space(extend=2), path, "a")["best"] == whole["best"] and not third.asked
    run_grid(third, space(), path, "another")
    assert len(third.asked) == 5


def test_what_is_sampled_needs_optuna_and_nothing_complete_is_told(tmp_path):
    with pytest.raises(ValueError, match="6 trials of 5 points: the others are sampled, which needs optuna"):
        run_grid(Objective(1e-3, 0), space(trials=6), tmp_path / "a.jsonl", "a")
    with pytest.raises(ValueError, match=r"no trial of 5 completed \(pruned or diverged\)"):
        run_grid(Objective(1e-3, 0, above=0.0), space(), tmp_path / "a.jsonl", "a")
