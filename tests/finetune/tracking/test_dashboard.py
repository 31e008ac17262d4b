"""The dashboard serialises, comes back the same, and names only what is logged."""

import json
import sys

import pytest

from finetune.efficiency.variants import VARIANTS
from finetune.tracking import dashboard, results
from finetune.tracking import tracker as tracking

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces 0.4 uses pydantic's old names

SECTIONS = dashboard.sections([variant.name for variant in VARIANTS])
SHOWN = dashboard.metrics(SECTIONS)


@pytest.fixture
def workspace():
    pytest.importorskip("wandb_workspaces")
    return dashboard.build("someone", "tests", SECTIONS)


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
    assert len(panels) == sum(len(section) for _, section in SECTIONS) > 20
    back = Workspace._from_model(View.model_validate_json(text))
    assert [s.name for s in back.sections] == [title for title, _ in SECTIONS]
    again = panels_of(json.loads(dashboard.serialise(back)))
    assert [panel | {"__id__": ""} for panel in again] == [panel | {"__id__": ""} for panel in panels]
    named = {name for panel in panels for name in panel["config"].get("metrics", [])}
    axes = {panel["config"].get("xAxis") for panel in panels} - {None, "_step"}
    assert named | axes == SHOWN
    for section in definition["spec"]["section"]["panelBankConfig"]["sections"]:  # no panel lies on another
        places = [panel["layout"] for panel in section["panels"]]
        cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < dashboard.WIDTH


def test_what_it_names_is_what_runs_log(config, monkeypatch):
    """Names of a real run of every kind of metric, with a counting allocator in CUDA's place."""
    from finetune.runs.glue import GlueProblem
    from finetune.runs.problem import Run
    from finetune.runs.run import run_once
    from finetune.training import memory

    logged, summaries = set(), set()
    monkeypatch.setattr(tracking.Tracker, "log", lambda self, values, step: logged.update(values))
    monkeypatch.setattr(memory, "peak", lambda device: 1000)
    for task in ("cola", "mrpc", "stsb"):
        record = run_once(GlueProblem(config("method=full")), Run(task, 1, {"learning_rate": 1e-3, "batch_size": 8}))
        summaries |= set(flat(tracking.chosen(record, tracking.SUMMARY)))
        config_keys = set(flat(tracking.chosen(record, tracking.CONFIG)))
        assert {dashboard.METHOD, dashboard.TASK, dashboard.MODEL} <= config_keys
    monkeypatch.setattr(tracking.Tracker, "summary", lambda self, values: summaries.update(flat(values)))
    off = {"mode": "disabled", "folder": "", "project": ""}
    run = {"experiment": "e", "kind": "search", "model": "m", "method": "lora", "task": "cola", "config_hash": "c"}
    trial = {"number": 0, "value": 0.25, "learning_rate": 0.01, "batch_size": 8, "seconds": 1.0}
    results.send_search({"run": run, "trials": [trial], "best": {}}, off)
    memory = {"peak_training": 1, "peak_evaluation": 2}
    variants = [{"name": v.name, "status": "finished", "steps_per_second": 2.0, "memory": memory} for v in VARIANTS]
    results.send_efficiency({"run": run | {"kind": "efficiency"}, "variants": variants}, off)
    of_variants = {f"{variant.name}.{name}" for variant in VARIANTS for name in tracking.VARIANT_METRICS}
    assert logged | of_variants <= SHOWN <= logged | summaries


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
    with pytest.raises(ValueError, match="pip install wandb-workspaces"):
        dashboard.build("someone", "tests", SECTIONS)
