"""Cost of HOSVD and cost curves as DVC runs them, and the figures from the records."""

import json

import pytest
import yaml

CURVES = [
    "scale.base={hidden: 8, inner: 32, tokens: 16, density: 0.05}",
    "scale.densities=[0.2]",
    "scale.tokens=[4]",
    "scale.widths=[16]",
    "scale.rounds=2",
    "device=cpu",
    "progress=false",
]


@pytest.fixture
def lists(tmp_path):
    content = {"name": "test", "protocol": "sound", "tasks": ["cola"], "efficiency_models": ["tiny_bert"]}
    (tmp_path / "work" / "params.yaml").write_text(yaml.safe_dump(content))


def test_the_curves_are_measured_once_and_drawn(script, lists):
    arguments = ["results=true", "name=test", "scale=cost_curves/smoke", *CURVES]
    done = script("cost_curves", *arguments)
    assert done.code == 0 and done.out == "", done.err
    path = done.folder / "results" / "test" / "cost_curves.json"
    found = json.loads(path.read_text())
    assert found["run"] == found["run"] | {"experiment": "test", "kind": "cost_curves", "scale": "smoke"}
    before = path.read_bytes()
    assert "is finished, reused" in script("cost_curves", *arguments).err and path.read_bytes() == before
    done = script("figure", "figure=figure_cost_curves", "name=test")
    assert done.code == 0 and done.out == "", done.err
    words = json.loads((done.folder / "results" / "test" / "figures" / "figure_cost_curves.json").read_text())
    assert words["source"] == ["results/test/cost_curves.json"]


def test_the_cost_of_hosvd_by_hand(script):
    case = "scale.cases={tiny: {shape: [24, 16], asked: 4, ways: {streaming: [4], unfoldings_float32: []}}}"
    done = script("hosvd_cost", case, "name=test", "device=cpu", "progress=false")
    assert done.code == 0 and done.out == "", done.err
    found = json.loads((done.folder / "outputs" / "test" / "hosvd_cost.json").read_text())
    entries = {entry["way"]: entry for entry in found["cases"][0]["entries"]}
    assert entries["streaming"]["status"] == "finished" and entries["streaming"]["peak_bytes"] >= 0
    assert entries["unfoldings_float32"]["status"] == "not run"
    assert "streaming / unfoldings_float32, 4 gradients: time unknown" in done.err


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("hosvd_cost", ["rank=17", "scale.cases.tiny.shape=[24,16]", "device=cpu"], "rank=17 of gradients of shape"),
        ("cost_curves", ["scale.rounds=0", "device=cpu"], "rounds=0; it must be a whole number"),
        ("figure", ["figure=nope", "name=test"], "figure='nope'; allowed: all, figure_02"),
        ("figure", ["figure=figure_efficiency", "name=test"], "no finished record of full fine-tuning"),
        ("figure", ["figure=figure_cost_curves", "name=test"], "cost_curves.json does not exist"),
        ("figure", ["figure=figure_cost_curves", "name=other"], "is experiment 'test', not 'other'"),
    ],
)
def test_wrong_input(name, arguments, text, script, lists):
    done = script(name, *arguments)
    assert done.code != 0 and text in done.err and "Traceback" not in done.err, done.err
