"""The paper's own experiment, as far as a machine without its weights can go.

Every cell composes, and one cell of each stage runs two steps at BERT-base's true size with random weights.
"""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune.data.generated import write_corpus, write_task
from finetune.methods import build_method
from finetune.models.tokenizers import train_tokenizer
from finetune.report.evidence.evidence import collect_evidence
from finetune.report.evidence.experiment import load_experiment
from finetune.report.tables.tables import build_table
from finetune.runs import cells, preliminary
from finetune.store import records
from finetune.store.experiment import expand, read_experiment
from sparsegrad import Basis

ROOT = Path(__file__).parents[2]
PAPER = [
    expand(read_experiment(ROOT / "experiments" / f"{name}.yaml"), ROOT / "conf")
    for name in ("paper", "paper_released")
]


def composed(*overrides: str) -> dict:
    with initialize_config_dir(version_base=None, config_dir=str(ROOT / "conf")):
        return OmegaConf.to_container(compose("glue", [*overrides]), resolve=True)


@pytest.mark.parametrize("experiment", PAPER, ids=lambda e: e["name"])
def test_every_cell_composes_into_its_method(experiment):
    import torch

    for model in experiment["models"]:
        for method in experiment["methods"]:
            names = {"model": model, "method": method, **{k: experiment[k] for k in ("protocol", "scale", "data")}}
            config = composed(*(f"{key}={value}" for key, value in names.items()))
            assert set(experiment["tasks"]) <= set(config["data"]["tasks"])
            square = {kind: Basis(torch.eye(2), torch.eye(2)) for kind in config["model"]["target_modules"]}
            built = build_method(config["method"], config["model"], config["protocol"], bases=square)
            hidden, inner = (config["model"]["architecture"][key] for key in ("hidden_size", "intermediate_size"))
            assert 0 < built.entries((inner, hidden)) <= inner * hidden


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> tuple[list[str], Path]:
    """The paper's configuration at BERT-base's true size, cut to two steps of eight short rows."""
    root = tmp_path_factory.mktemp("paper")
    write_corpus(root / "corpus.txt", 500, seed=0)
    write_task("cola", root / "glue", 40, 16, seed=0)
    lines = (root / "corpus.txt").read_text().splitlines()
    train_tokenizer(lines, "bert", 200, 16).save_pretrained(root / "tokenizer")
    return [
        "name=paper", "model=bert_base", "protocol=printed", "scale=paper", "data=glue",
        "model.random_weights=true", f"+model.tokenizer={root}/tokenizer", f"data.root={root}",
        "protocol.max_length=16", "protocol.preliminary.steps=2", "protocol.preliminary.batch_size=2",
        "scale.max_steps=2", "scale.evaluation_steps=2", "scale.search.max_steps=2", "scale.search.trials=1",
        "scale.search.points=[{learning_rate: 1.0e-05, batch_size: 8}]",
        "device=cpu", "progress=false", "wandb.mode=disabled", f"checkpoints={root}/checkpoints",
    ], root  # fmt: skip


@pytest.mark.slow  # a minute on a free core
@pytest.mark.timeout(1200)
def test_one_cell_of_each_stage_runs_at_bert_bases_true_size(overrides):
    arguments, root = overrides
    results = root / "results"

    def cell(*more: str) -> cells.Cell:
        problem = cells.make_problem(composed(*arguments, "method=sparsegrad", *more))
        return cells.Cell(problem, ["cola"], [42], results)

    preliminary.gradients_cell(cell())
    preliminary.basis_cell(cell())
    cells.train_cell(cell(f"basis={results}/basis/bert_base"))

    folder = results / "runs" / "bert_base" / "sparsegrad"
    record = json.loads(next(folder.glob("cola-seed42-*.json")).read_text())
    assert record["status"] == "finished" and record["training"]["steps"] == 2
    # Two labels: 109,483,778 parameters (the architecture's own count); 24 matrices with 1 % of 2,359,296 entries each.
    assert record["parameters"]["total"] == 109_483_778
    assert record["parameters"]["wrapped_layers"] == 24
    assert record["parameters"]["trainable_per_layer"] == 23_593
    assert record["parameters"]["trainable"] == 109_483_778 - 24 * (2_359_296 - 23_593)
    assert record["basis"]["gradients"] == {"up": 24, "down": 24}

    experiment = load_experiment(ROOT / "experiments" / "paper.yaml", "paper", ROOT / "conf")
    ran = [(path.name, content) for path, content in records.iterate(results / "runs")]
    table = build_table(9, collect_evidence(experiment, records=ran))
    cell = table.cell("SparseGrad", "CoLA")
    assert cell.n == 1 and cell.verdict == "not comparable"  # random weights are not the paper's model
    assert {reason.kind for reason in cell.reasons} == {"random_weights"}
    labels = [experiment.labels.method(name) for name in experiment.ablations["bert_base"]]
    assert [*table.rows] == ["Regular FT", "LoRA", "SparseGrad", "MeProp", *labels]
