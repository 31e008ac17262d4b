"""examples/mrpc.ipynb is committed with the outputs of one run of all its cells, and runs."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "mrpc.ipynb"
DATA = Path(os.environ.get("SPARSEGRAD_DATA") or ROOT / "data")


@pytest.fixture(scope="module")
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_those_of_one_run_and_hold_a_picture(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_notebook_runs_and_its_numbers_come_again(cells, monkeypatch):
    if not all((DATA / path).exists() for path in ("models/minilm/model.safetensors", "glue/mrpc")):
        pytest.skip(f"MiniLM or MRPC is not below {DATA}")
    import matplotlib.pyplot as plt

    monkeypatch.setenv("SPARSEGRAD_DATA", str(DATA))
    monkeypatch.setattr(plt, "show", lambda: None)
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    plt.close("all")
    scores = names["scores"]
    assert scores["SparseGrad"][0] < scores["before"][0] - 0.05
    assert names["curves"]["rotated"][names["entries"] // 100] > names["curves"]["original"][names["entries"] // 100]
    assert names["evaluate"](names["plain"])[0] == pytest.approx(scores["SparseGrad"][0], rel=1e-4)
    printed = "".join(line for cell in cells for output in cell["outputs"] for line in output.get("text", []))
    assert f"before: loss {scores['before'][0]:.3f}" in printed
