"""A run's identity: all that decides its numbers, by content, and nothing else. No run is trained here but the last."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from finetune import models
from finetune.runs import cells, preliminary
from finetune.runs.problem import Run
from sparsegrad import Basis, load_bases, save_bases


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap_words(path):
    """Two words of a vocabulary change places: the same words, other token ids."""
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    path.write_text(json.dumps(content))


def nudge(path):
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def relabel(path):
    table = pq.read_table(path)
    labels = table.column("label").to_pylist()
    labels[0] = 1 - labels[0]
    place = table.column_names.index("label")
    pq.write_table(table.set_column(place, "label", [labels]), path)


def repack(path):
    pq.write_table(pq.read_table(path), path, compression="zstd")


TRAIN = "glue/cola/train-00000-of-00001.parquet"
OTHERS = {
    "dropout": lambda root: edit(root / "models/tiny/config.json", hidden_dropout_prob=0.5),
    "activation": lambda root: edit(root / "models/tiny/config.json", hidden_act="relu"),
    "epsilon": lambda root: edit(root / "models/tiny/config.json", layer_norm_eps=1e-3),
    "generation": lambda root: (root / "models/tiny/generation_config.json").write_text('{"bos_token_id": 3}'),
    "tokenizer": lambda root: swap_words(root / "models/tiny/tokenizer.json"),
    "weights": lambda root: nudge(root / "models/tiny/model.safetensors"),
    "a label": lambda root: relabel(root / TRAIN),
    "validation": lambda root: relabel(root / "glue/cola/validation-00000-of-00001.parquet"),
}
SAME = {
    "moved": lambda root: edit(root / "models/tiny/config.json", _name_or_path="/elsewhere", transformers_version="9"),
    "packed again": lambda root: repack(root / TRAIN),
    "a title": lambda root: (root / "models/tiny/README.md").write_text("tiny"),
}


@pytest.fixture
def digest(config, tiny_checkpoint, glue_root, tmp_path):
    """``digest(*overrides)``: of a run of CoLA on a copy of checkpoint and data, in ``tmp_path / "root"``."""
    root = tmp_path / "root"
    shutil.copytree(glue_root, root)
    shutil.copytree(tiny_checkpoint, root / "models" / "tiny")

    def make(*overrides):
        found = config(f"data.root={root}", f"model.checkpoint={root / 'models' / 'tiny'}", *overrides)
        problem = cells.make_problem(found)
        return problem.digest(Run("cola", 1, problem.hyperparameters()))

    return make


@pytest.mark.parametrize("what", [*OTHERS, *SAME])
def test_files_count_by_what_the_model_gets_to_see(what, digest, tmp_path):
    before = digest("method=full")
    (OTHERS | SAME)[what](tmp_path / "root")
    assert (digest("method=full") == before) is (what in SAME)


def test_another_tokenizer_for_the_same_weights_is_another_run(digest, tiny_checkpoint, tmp_path):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    named = f"++model.tokenizer={other}"
    assert digest("method=full", named) == digest("method=full")
    swap_words(other / "tokenizer.json")
    assert digest("method=full", named) != digest("method=full")


def test_a_tokenizer_decides_a_decoders_run_and_its_configuration_too(chat_config, chat_root, tmp_path):
    def digest():
        problem = cells.make_problem(chat_config("method=full", f"chat.root={root}"))
        return problem.digest(Run("oasst1", 1, problem.hyperparameters()))

    root = shutil.copytree(chat_root, tmp_path / "root")
    before = [digest()]
    edit(root / "models/tiny/config.json", rms_norm_eps=1e-3)
    before.append(digest())
    path = root / "models/tiny/tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    a, b = [word for word in words if len(word) == 1 and word.isalpha()][:2]
    words[a], words[b] = words[b], words[a]
    path.write_text(json.dumps(content))
    before.append(digest())
    assert len({*before}) == 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory, compose, tiny_checkpoint, glue_root):
    """A folder of CoLA's bases."""
    folder = tmp_path_factory.mktemp("bases")
    names = ("model=tiny_bert", f"model.checkpoint={tiny_checkpoint}", f"data.root={glue_root}", "scale=smoke")
    small = ("protocol.preliminary.steps=2", "protocol.preliminary.batch_size=8", "device=cpu", "progress=false")
    cell = cells.Cell(cells.make_problem(compose(*names, *small)), ["cola"], [1], folder)
    preliminary.gradients_cell(cell)
    preliminary.basis_cell(cell)
    return folder / "basis" / "tiny_bert"


def test_other_bases_are_another_run_whatever_they_say_they_are_of(bases, config, tmp_path):
    """The same file with one basis turned: what it was made for stays."""

    def digest(basis):
        problem = cells.make_problem(config("method=sparsegrad") | {"basis": basis})
        return problem.digest(Run("cola", 1, problem.hyperparameters()))

    found, facts = load_bases(bases / "cola.safetensors")
    turned = found | {"up": Basis(found["up"].U.flip(0), found["up"].V)}
    save_bases(tmp_path / "turned.safetensors", turned, facts)
    save_bases(tmp_path / "same.safetensors", found, facts)
    digests = [digest(str(path)) for path in (bases, tmp_path / "same.safetensors", tmp_path / "turned.safetensors")]
    assert digests[0] == digests[1] != digests[2]
    assert digest(None) not in digests  # collected in the run


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("version=9", "version=1, this run has version=9"),
        ("scale.train_examples=32", "data="),
        ("protocol.max_length=6", "data="),
        ("protocol.hosvd=tensorly", "hosvd=moments, this run has hosvd=tensorly"),
        ("model.layers_to_transform=[0]", "targets="),
        ("protocol.preliminary.steps=3", "preliminary="),
    ],
)
def test_bases_of_another_preliminary_phase_are_refused(override, named, bases, config):
    problem = cells.make_problem(config("method=sparsegrad", override) | {"basis": str(bases)})
    with pytest.raises(ValueError, match=f"cola.safetensors was made with {named}.*run the gradients and basis stages"):
        problem.bases("cola")


@pytest.mark.parametrize(
    "override",
    [
        "protocol.search.batch_sizes=[8,16]",
        "protocol.search.learning_rate=[1e-5,0.1]",
        "scale.search.pruning.warmup_steps=3",
        "scale.search.points=[{learning_rate: 0.01, batch_size: 8}]",
        "scale.search.max_steps=7",
    ],
)
def test_another_space_is_another_search_and_no_other_run(override, config):
    def digests(*overrides):
        problem = cells.make_problem(config("method=full", *overrides))
        steps = problem.config["scale"]["search"]["max_steps"]
        whole = Run("cola", 34, {"max_steps": steps}, search=True)
        return problem.digest(whole), problem.digest(Run("cola", 1, problem.hyperparameters()))

    before, after = digests(), digests(override)
    assert before[0] != after[0] and before[1] == after[1]
    assert digests("scale.search.trials=9") == before  # more trials go on with those there are


def test_a_branch_of_the_hub_counts_by_its_commit(compose, tmp_path, monkeypatch):
    """``revision: null`` or a branch moves; the commit is that of the files in the cache."""
    from transformers.utils import hub

    group = compose("model=tiny_bert")["model"] | {"checkpoint": "acme/tiny", "folder": "none", "revision": "main"}
    commits = [letter * 40 for letter in "abc"]
    for commit in commits[:2]:
        path = tmp_path / "snapshots" / commit / "config.json"
        monkeypatch.setattr(hub, "cached_file", lambda name, file, revision, path=path: str(path))
        assert models.contents(group, tmp_path) == {"sha256": f"acme/tiny@{commit}"}
    pinned = group | {"revision": commits[2]}
    assert models.contents(pinned, tmp_path) == {"sha256": f"acme/tiny@{commits[2]}"}
