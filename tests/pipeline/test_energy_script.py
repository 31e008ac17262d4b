"""The energy stage as DVC runs it, on the tiny checkpoint and tasks, and the figures from its records."""

import json

import pytest
import yaml

FIGURES = ("figure_02", "figure_03", "figure_energy")


@pytest.fixture
def arguments(tiny_checkpoint, glue_root):
    return [
        "model=tiny_bert",
        f"model.checkpoint={tiny_checkpoint}",
        f"data.root={glue_root}",
        "protocol.preliminary.steps=2",
        "protocol.preliminary.batch_size=8",
        "protocol.density=0.05",
        "device=cpu",
        "progress=false",
        "name=test",
    ]


@pytest.fixture
def lists(tmp_path):
    """An experiment file of two tasks."""
    (tmp_path / "work").mkdir(exist_ok=True)
    content = {"name": "test", "tasks": ["cola", "mrpc"], "seeds": [1], "stands_for": {"bert_base": "tiny_bert"}}
    (tmp_path / "work" / "params.yaml").write_text(yaml.safe_dump(content))
    return content


def small(*steps):
    return [
        "scale=energy/smoke",
        f"scale.steps=[{','.join(map(str, steps))}]",
        "scale.batch_size=4",
        "scale.refresh_batches=2",
    ]


def test_bases_energy_and_three_figures_that_a_rerun_repeats(script, arguments, lists):
    for stage in ("gradients", "basis"):
        done = script(stage, "cell=params.yaml", "wandb.mode=disabled", *arguments)
        assert done.code == 0, done.err
    arguments = ["cell=params.yaml", "basis=results/test/basis/tiny_bert", *arguments, *small(0, 2, 3)]
    done = script("energy", *arguments)
    assert done.code == 0, done.err
    folder = done.folder / "results" / "test" / "energy" / "tiny_bert"
    assert len(list(folder.iterdir())) == 8
    figures = done.folder / "results" / "test" / "figures"
    for name in FIGURES:
        done = script("figure", f"figure={name}", "name=test")
        assert done.code == 0 and done.out == "", done.err
        words = json.loads((figures / f"{name}.json").read_text())
        assert "tiny BERT stands in BERT's place" in words["notes"][0] and words["source"]
        assert all((done.folder / path).is_file() for path in words["source"])
    assert {path.name for path in figures.iterdir()} == {
        f"{n}.{end}" for n in FIGURES for end in ("svg", "png", "json")
    }
    before = {path: path.read_bytes() for path in [*folder.iterdir(), *figures.iterdir()]}
    done = script("energy", *arguments)
    assert done.code == 0 and done.err.count("is finished, reused") == 4
    for name in FIGURES:
        assert script("figure", f"figure={name}", "name=test").code == 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["figure=nope", "name=test"], "figure='nope'; allowed: all, figure_02"),
        (["figure=figure_02", "name=other"], "is experiment 'test', not 'other'"),
        (["figure=figure_02", "name=test"], "holds no record of cola, mrpc: run the energy stage"),
    ],
)
def test_wrong_input_of_a_figure(overrides, text, script, lists):
    done = script("figure", *overrides)
    assert done.code != 0 and text in done.err and "Traceback" not in done.err, done.err


def test_energy_without_bases(script, arguments):
    done = script("energy", *arguments, *small(0, 2))
    assert done.code != 0 and "run the gradients and basis stages" in done.err and "Traceback" not in done.err
