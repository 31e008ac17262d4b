"""The dashboard serialises, comes back the same, and names only what is logged."""

import json
import sys

import pytest

from finetune.efficiency.variants import VARIANTS
from finetune.tracking import dashboard, mirror
from finetune.tracking import tracker as tracking

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces 0.4 uses pydantic's old names


@pytest.fixture
def workspace():
    pytest.importorskip("wandb_workspaces")
    return dashboard.build("someone", "tests")


def panels_of(definition):
    return [
        panel for section in definition["spec"]["section"]["panelBankConfig"]["sections"] for panel in section["panels"]
    ]


def flat(values, above=""):
    for name, value in values.items():
        yield from flat(value, f"{above}{name}.") if isinstance(value, dict) else [f"{above}{name}"]


def test_the_definition_holds_every_panel_and_comes_back_the_same(workspace):
    from wandb_workspaces.workspaces import Workspace
    from wandb_workspaces.workspaces.internal import View

    text = dashboard.serialise(workspace)
    definition = json.loads(text)
    assert (definition["entity"], definition["project"]) == ("someone", "tests")
    panels = panels_of(definition)
    assert len(panels) == sum(len(section) for _, section in dashboard.SECTIONS) > 20
    back = Workspace._from_model(View.model_validate_json(text))
    assert [s.name for s in back.sections] == [title for title, _ in dashboard.SECTIONS]
    again = panels_of(json.loads(dashboard.serialise(back)))
    assert [panel | {"__id__": ""} for panel in again] == [panel | {"__id__": ""} for panel in panels]
    named = {name for panel in panels for name in panel["config"].get("metrics", [])}
    axes = {panel["config"].get("xAxis") for panel in panels} - {None, "_step"}
    assert named | axes == dashboard.metrics()


def test_panels_do_not_lie_on_each_other(workspace):
    for section in json.loads(dashboard.serialise(workspace))["spec"]["section"]["panelBankConfig"]["sections"]:
        places = [panel["layout"] for panel in section["panels"]]
        cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < dashboard.WIDTH


def test_it_names_only_names_of_tracking():
    of_variants = {f"{variant.name}.{name}" for variant in VARIANTS for name in tracking.VARIANT_METRICS}
    allowed = {*tracking.METRICS, *tracking.SUMMARY_METRICS, *of_variants}
    assert dashboard.metrics() <= allowed
    assert {dashboard.METHOD, dashboard.TASK, dashboard.MODEL} <= set(tracking.CONFIG_KEYS)
    shown = dashboard.metrics()
    assert set(tracking.METRICS) <= shown and set(tracking.SUMMARY_METRICS) <= shown


def test_what_it_names_is_what_runs_log(config, monkeypatch):
    """Names of a real run of every kind of metric, with a counting allocator in CUDA's place."""
    from finetune.runs.glue import Inputs, train_run
    from finetune.training import memory

    logged = set()
    monkeypatch.setattr(tracking.Tracker, "log", lambda self, values, step: logged.update(values))
    monkeypatch.setattr(memory, "peak", lambda device: 1000)
    summaries = set()
    for task in ("cola", "mrpc", "stsb"):
        inputs = Inputs(config("method=full"))
        record = train_run(inputs, task, 1, {"learning_rate": 1e-3, "batch_size": 8})
        sent = mirror.of_training(record)
        summaries |= set(flat(sent.summary))
        assert set(tracking.CONFIG_KEYS) <= set(flat(sent.config))
        assert {name for _, values in sent.history for name in values} <= logged
    trials = {name for name in tracking.METRICS if name.startswith("trial/")}  # test_replay.py has their values
    assert logged == set(tracking.METRICS) - trials
    assert set(tracking.SUMMARY_METRICS) <= summaries


def test_trials_and_variants_have_the_names_that_it_shows(tmp_path):
    run = {"experiment": "e", "kind": "search", "model": "m", "method": "lora", "task": "cola", "config_hash": "c"}
    trial = {"number": 0, "value": 0.25, "learning_rate": 0.01, "batch_size": 8, "seconds": 1.0}
    sent = mirror.of_search({"run": run, "trials": [trial], "best": {}}, tmp_path)
    assert set(sent.history[0][1]) == {name for name in tracking.METRICS if name.startswith("trial/")}
    memory = {"peak_training": 1, "peak_evaluation": 2}
    variants = [{"name": v.name, "status": "finished", "steps_per_second": 2.0, "memory": memory} for v in VARIANTS]
    sent = mirror.of_efficiency({"run": run | {"kind": "efficiency"}, "variants": variants})
    shown = {f"{variant.name}.{name}" for variant in VARIANTS for name in tracking.VARIANT_METRICS}
    assert shown <= set(flat(sent.summary)) and shown <= dashboard.metrics()


def test_publishing_needs_the_key_from_the_environment(monkeypatch):
    class Saved:
        url = "https://wandb.ai/someone/tests?nw=abc"

        def save(self):
            return self

    class Refused:
        def save(self):
            raise RuntimeError("permission\ndenied")

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match="WANDB_API_KEY is not set"):
        dashboard.publish(Saved())
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert dashboard.publish(Saved()) == Saved.url
    with pytest.raises(ValueError, match="wandb did not take the workspace: permission denied"):
        dashboard.publish(Refused())


def test_without_wandb_workspaces_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ValueError, match="wandb-workspaces is not installed: pip install wandb-workspaces"):
        dashboard.build("someone", "tests")
