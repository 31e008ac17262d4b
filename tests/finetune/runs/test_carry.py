"""Carried runs: a folder with configuration, data and bases, run without what a bare machine lacks, and taken back."""

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from finetune.runs import carried
from finetune.runs.carried import carried_cells
from finetune.runs.carry import carry
from finetune.runs.cells import Cell
from finetune.runs.preliminary import basis_cell, gradients_cell
from finetune.runs.slices import composed_cells, run_slice
from finetune.store import origin, pack, unpack
from finetune.store.experiment import write_params
from finetune.store.records import iterate, read_json, read_record

ROOT = Path(__file__).parents[3]
MINI = """
extends: smoke
tasks: [cola]
seeds: [1]
methods: [full]
ablations: [sparsegrad]
decoder_ablations: []
decoder_seeds: [1, 2]
workers: 1
"""
POINTS = [{"learning_rate": rate, "batch_size": 32} for rate in (3.0e-4, 1.0e-3)]
GRID = {"trials": 2, "points": POINTS, "max_steps": 2, "pruning": {"startup_trials": 2, "warmup_steps": 1}}
SMALL = {
    "scale/smoke": {"max_steps": 4, "evaluation_steps": 2, "batch_size": 8, "search": GRID},
    "scale/llama/smoke": {"max_steps": 2, "evaluation_steps": 1, "max_length": 32, "warmup_steps": 1},
    "base": {"device": "cpu", "progress": False},
}
LACKING = ("hydra", "omegaconf", "pydantic", "datasets", "optuna", "fastchat", "dvc", "wandb")
BEHIND = ("finetune.config.check", "finetune.store.experiment", "finetune.runs.search", "finetune.runs.search_journal")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint, glue_root, chat_root):
    """A checkout of a tiny experiment with its data, models and bases; nothing is trained."""
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "conf", checkout / "conf", ignore=shutil.ignore_patterns("lengths"))
    shutil.copytree(ROOT / "experiments", checkout / "experiments", ignore=shutil.ignore_patterns("*.py"))
    shutil.copy(ROOT / "dvc.yaml", checkout)
    (checkout / "experiments" / "mini.yaml").write_text(MINI)
    protocol = yaml.safe_load((ROOT / "conf/protocol/sound.yaml").read_text())["preliminary"]
    changes = SMALL | {"protocol/sound": {"preliminary": protocol | {"steps": 2, "batch_size": 8}}}
    for name, change in changes.items():
        path = checkout / "conf" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change, sort_keys=False))
    data, chat = (checkout / "results" / "mini" / kind for kind in ("data", "chat"))
    shutil.copytree(glue_root / "glue" / "cola", data / "glue" / "cola")
    shutil.copytree(tiny_checkpoint, data / "models" / "tiny_bert")
    shutil.copytree(chat_root, chat)
    (chat / "models" / "tiny").rename(chat / "models" / "tiny_llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        write_params("experiments/mini.yaml", "params.yaml")
        cell = next(cell for cell in cells_here() if cell.problem.config["method"]["name"] == "sparsegrad")
        gradients_cell(cell)
        basis_cell(cell)
    return checkout


@pytest.fixture
def checkout(made, tmp_path, monkeypatch):
    """A copy of it, the working folder, of a known commit."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for module in (origin, pack):
        monkeypatch.setattr(module, "provenance", lambda: {"commit": "a" * 40, "dirty": False})
    return tmp_path


@pytest.fixture
def weights(checkout):
    """The checkpoints, laid out as ``data.root`` is, in a folder of their own."""
    for model, kind in (("tiny_bert", "data"), ("tiny_llama", "chat")):
        shutil.copytree(checkout / "results/mini" / kind / "models" / model, checkout / "weights/models" / model)
    return checkout / "weights"


@contextmanager
def bare():
    """In it nothing can be imported that a bare machine lacks, nor what of ours needs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*LACKING, *BEHIND):
            patch.setitem(sys.modules, name, None)
        yield


def cells_here():
    loads = {}
    return [Cell.of(config, loads) for config in composed_cells("params.yaml")]


def read(results):
    return {path.relative_to(results): record for path, record in iterate(results)}


def test_what_is_run_elsewhere_is_what_is_run_here_and_counts_as_that(checkout, weights, numbers):
    folder, results = checkout / "folder", checkout / "results" / "mini"
    decoder = next(cell for cell in cells_here() if cell.problem.kind == "llama")
    run_slice([Cell(decoder.problem, decoder.tasks, [2], decoder.results)])  # its merged model is here
    carry(Path("experiments/mini.yaml"), folder)
    assert [entry["seeds"] for entry in read_json(folder / "carried.json")["cells"]] == [[1], [1], [1]]
    assert {path.parent.name for path in folder.rglob("*.safetensors")} == {"data", "tiny_bert"}  # no weights
    run_slice(cells_here())
    here = read(results)
    shutil.move("results", "hidden")
    with bare():
        cells = carried_cells(folder, weights)
        carried.check_searches(cells)
        run_slice(cells).check()
        pack.pack(folder, Path("back.tar.xz"))
    there = read(folder / "results" / "mini")
    assert len(there) == 3 and all(record["provenance"]["commit"] for record in there.values())
    shutil.move("hidden", "results")
    searched = {path: read_record(path) for path in results.glob("search/*/*/cola.json")}
    for kind in ("runs", "search"):
        shutil.rmtree(results / kind)
    unpack.unpack(Path("back.tar.xz"))
    back = read(results)
    assert back.keys() == there.keys() < here.keys()
    assert all(numbers(back[name]) == numbers(here[name]) for name in back)
    for path, search in searched.items():  # by Optuna here, without it there
        elsewhere = read_record(path)
        assert elsewhere["best"] == search["best"] and elsewhere["run"] == search["run"]
        assert len(elsewhere["trials"]) == 2
    assert len(searched) == 2
    run_slice(cells_here()[:2])  # encoders are done; a decoder's merged model does not travel
    assert read(results) == back


@pytest.fixture(scope="module")
def written(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        carry(Path("experiments/mini.yaml"), made / "folder")
    return made / "folder"


@pytest.fixture
def folder(written, checkout):
    """A carried folder in the checkout."""
    return shutil.copytree(written, checkout / "folder", dirs_exist_ok=True)


def lose(path):
    path.unlink()


def nudge(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("place", ["data", "basis/tiny_bert"])
@pytest.mark.parametrize("fault", [lose, nudge])
def test_a_folder_that_lacks_a_file_or_holds_another_is_refused(place, fault, folder, weights):
    path = sorted((folder / place).iterdir())[0]
    fault(path)
    with pytest.raises(ValueError, match=rf"{path} is missing, or another than was written: copy the folder again"):
        carried_cells(folder, weights)


def test_no_weights_and_others_are_refused(folder, weights):
    with pytest.raises(ValueError, match=r"no/models/tiny_bert: copy them there, or give another --weights"):
        carried_cells(folder, Path("no"))
    shutil.rmtree(weights / "models/tiny_bert")
    shutil.copytree(weights / "models/tiny_llama", weights / "models/tiny_bert")
    with pytest.raises(ValueError, match=r"models/tiny_bert holds other weights of tiny_bert .*\(by sha256\)"):
        carried_cells(folder, weights)
    (folder / "carried.json").unlink()
    with pytest.raises(ValueError, match=r"carried\.json does not exist"):
        carried_cells(folder, weights)


def test_nothing_is_carried_without_bases_or_over_something(checkout, folder):
    with pytest.raises(ValueError, match="folder is there, and may hold what was done of it"):
        carry(Path("experiments/mini.yaml"), folder)
    shutil.rmtree("results/mini/basis")
    with pytest.raises(ValueError, match=r"basis/tiny_bert.* does not exist: run the stage"):
        carry(Path("experiments/mini.yaml"), checkout / "other")
    assert not (checkout / "other").exists()


def test_without_optuna_the_record_of_a_search_must_travel(cell_of):
    cell = cell_of("method=full", "learning_rate=null", "batch_size=null", "scale.search.trials=3")
    with (
        bare(),
        pytest.raises(
            ValueError, match=r"1 searches that sample are missing, such as .*search/tiny_bert/full/cola\.json"
        ),
    ):
        carried.check_searches([cell])
    grid = cell_of("method=full", "learning_rate=null", "batch_size=null")
    with bare():
        carried.check_searches([grid])
    carried.check_searches([cell])
