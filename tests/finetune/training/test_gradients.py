"""The preliminary phase: the gradients are the model's own, the model is not, and a basis knows where it comes from."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from finetune.methods import Targets
from finetune.runs.cells import Cell
from finetune.runs.glue import GlueProblem
from finetune.runs.preliminary import basis_cell, gradients_cell
from finetune.training.gradients import PreliminaryOptions, collect, pack, unpack
from sparsegrad import load_bases, load_tensors, save_bases, save_tensors

CPU = torch.device("cpu")
KINDS = {"up": (64, 32), "down": (32, 64)}


@pytest.fixture
def targets(config):
    return Targets(config()["model"]["target_modules"])


@pytest.fixture
def gather(spy, targets):
    """``gather(model, split=None, keep_weights=False, seed=3, ...)``: a collection of three batches of eight."""

    def make(model, split=None, keep_weights=False, seed=3, on=targets, **changes):
        options = PreliminaryOptions(**{"steps": 3, "batch_size": 8} | changes)
        return collect(
            model, split or spy(), on, options, seed=seed, device=CPU, keep_weights=keep_weights, progress_bar=False
        )

    return make


def by_hand(model, split, targets, *, update=None):
    """The same gradients by plain torch, from the rows that were asked for; ``update`` is a learning rate."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=update or 1.0, weight_decay=0.0)
    gradients = {kind: [] for kind in KINDS}
    for rows in split.rows:
        batch = split.split.batch(rows)
        labels = batch.pop("labels")
        model.zero_grad()
        F.cross_entropy(model(**batch).logits, labels).backward()
        for target in targets.find(model):
            gradients[target.kind].append(target.module.weight.grad.clone())
        if update is not None:
            optimizer.step()
    return {kind: torch.stack(found).double() for kind, found in gradients.items()}, model


def test_model_is_left_untouched(classifier, gather):
    for training in (True, False):
        model = classifier().train(training)
        model.classifier.weight.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        gather(model)
        gather(model, keep_weights=True)  # nothing steps, so there is nothing to keep
        gather(model, update=True, learning_rate=1e-2)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.training is training and all(m.training is training for m in model.modules())
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["classifier.weight"]
        assert all(p.grad is None for p in model.parameters())


def test_moments_are_of_the_gradients_by_hand(classifier, gather, spy, targets):
    model, split = classifier(dropout=False), spy()
    collected = gather(model, split)
    expected, _ = by_hand(model, split, targets)
    for kind, shape in KINDS.items():
        G, moments = expected[kind], collected.moments[kind]
        assert moments.count == len(G) == 6  # three batches, two blocks
        torch.testing.assert_close(moments.left, torch.einsum("nij,nkj->ik", G, G), rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(moments.right, torch.einsum("nij,nik->jk", G, G), rtol=1e-4, atol=1e-10)
        assert (moments.left.shape[0], moments.right.shape[0]) == shape


def test_update_steps_adamw_on_the_whole_copy(classifier, gather, spy, targets):
    model, split = classifier(dropout=False), spy()
    collected = gather(model, split, update=True, learning_rate=1e-3)
    expected, _ = by_hand(model, split, targets, update=1e-3)
    still, _ = by_hand(model, split, targets)
    for kind in KINDS:
        G = expected[kind]
        left = torch.einsum("nij,nkj->ik", G, G)
        torch.testing.assert_close(collected.moments[kind].left, left, rtol=1e-3, atol=1e-9)
        assert not torch.allclose(still[kind], G, rtol=1e-2, atol=1e-6)


def test_keep_weights_leaves_the_stepped_weights(classifier, gather, spy, targets):
    model, split = classifier(dropout=False), spy()
    start = copy.deepcopy(model)
    gather(model, split, keep_weights=True, update=True, learning_rate=1e-3)
    _, expected = by_hand(start, split, targets, update=1e-3)
    parameters = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # cancels in the softmax: its gradient is rounding noise
            torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=1e-6)
            assert not torch.equal(parameter, start.get_parameter(name))


def test_bases_are_orthogonal_and_those_of_the_stacked_gradients(classifier, gather, spy, targets):
    from sparsegrad import hosvd_of_unfoldings

    model, split = classifier(dropout=False), spy()
    bases = gather(model, split).bases()
    stacks, _ = by_hand(model, split, targets)
    for kind, basis in bases.items():
        assert basis.orthogonality_error() < 1e-10
        assert (basis.out_features, basis.in_features) == KINDS[kind]
        literal = hosvd_of_unfoldings(stacks[kind])
        for found, expected in ((basis.U, literal.U), (basis.V, literal.V)):
            projector = found[:4].T @ found[:4]
            torch.testing.assert_close(projector, expected[:4].T @ expected[:4], rtol=0, atol=1e-4)


def test_tensorly_gives_the_same_subspaces(classifier, gather):
    model = classifier()
    moments, stacked = gather(model), gather(model, backend="tensorly")
    assert not moments.stacks and {kind: len(stack) for kind, stack in stacked.stacks.items()} == {"up": 6, "down": 6}
    for kind in KINDS:
        a, b = moments.bases()[kind], stacked.bases()[kind]
        for found, expected in ((a.U, b.U), (a.V, b.V)):
            for rank in (1, 4):
                projector = found[:rank].T @ found[:rank]
                torch.testing.assert_close(projector, expected[:rank].T @ expected[:rank], rtol=0, atol=1e-4)


def test_seed_decides_rows_and_dropout(classifier, gather, spy):
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(99)
        split = spy()
        collected = gather(classifier(), split, seed=seed)
        found.append((split.rows, collected.moments["up"].left))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][1], found[2][1])
    assert [len(rows) for rows in found[0][0]] == [8, 8, 8] and len({*itertools.chain(*found[0][0])}) == 24


def test_more_steps_than_an_epoch_and_more_rows_than_there_are(classifier, gather, spy):
    split, small = spy(), spy(limit=5)
    gather(classifier(), split, steps=7)
    assert [len(rows) for rows in split.rows] == [8] * 7 and {*itertools.chain(*split.rows)} == set(range(40))
    gather(classifier(), small, steps=2)
    assert [sorted(rows) for rows in small.rows] == [list(range(5))] * 2


def test_layers_to_transform(classifier, gather, targets):
    only = Targets(targets.target_modules, layers_to_transform=[1])
    facts = gather(classifier(), on=only, seed=5).facts
    assert facts["gradients"] == {"up": 3, "down": 3} and facts["seed"] == 5
    assert 0.3 < facts["loss_first"] < 1.5 and 0.3 < facts["loss_last"] < 1.5


def test_target_that_is_missing(classifier, gather):
    with pytest.raises(ValueError, match="target_modules.up='mlp' matches no module in full"):
        gather(classifier(), on=Targets({"up": "mlp"}))


def test_loss_that_is_not_finite(classifier, gather):
    model = classifier()
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"loss is nan at batch 1: check the checkpoint and data\."):
        gather(model)


@pytest.mark.parametrize("backend", ["moments", "tensorly"])
def test_collection_outlives_a_file(backend, classifier, gather, tmp_path):
    collected = gather(classifier(), backend=backend)
    save_tensors(tmp_path / "a.safetensors", pack(collected), collected.facts)
    again = unpack(*load_tensors(tmp_path / "a.safetensors"))
    for kind, basis in collected.bases().items():
        assert torch.equal(again.bases()[kind].U, basis.U) and torch.equal(again.bases()[kind].V, basis.V)
    assert again.moments["up"].count == 6 and len(again.stacks) == (2 if backend == "tensorly" else 0)


# The stages, and what they leave for a run


@pytest.fixture
def stages(config, tmp_path):
    """``stages("protocol.hosvd=tensorly", ...)``: gradients and bases of CoLA; gives the folder of the bases."""

    def make(*overrides, tasks=("cola",)):
        cell = Cell(GlueProblem(config(*overrides)), tasks, [], tmp_path)
        gradients_cell(cell)
        basis_cell(cell)
        return tmp_path / "basis" / "tiny_bert"

    return make


def test_stages_leave_moments_and_bases_with_their_origin(stages, config, tmp_path):
    folder = stages(tasks=("cola", "stsb"))
    assert sorted(p.name for p in folder.iterdir()) == ["cola.safetensors", "hosvd.json", "stsb.safetensors"]
    moments, facts = load_tensors(tmp_path / "gradients" / "tiny_bert" / "cola.safetensors")
    assert facts["content"] == "moments" and {t.dtype for t in moments.values()} == {torch.float64}
    bases, facts = load_bases(folder / "cola.safetensors")
    inputs = GlueProblem(config())
    assert facts["model_sha256"] == inputs.contents["sha256"] and facts["version"] == 1
    assert facts["data"] == inputs.splits("cola")["train"].content
    assert facts["task"] == "cola" and facts["gradients"] == {"up": 4, "down": 4}
    assert facts["preliminary"] == config()["protocol"]["preliminary"]
    assert facts["seed"] == config()["protocol"]["search_seed"]
    assert {basis.U.dtype for basis in bases.values()} == {torch.float32}
    assert all(basis.orthogonality_error() < 1e-5 for basis in bases.values())


def test_backends_of_the_stages_agree(stages, tmp_path):
    found = {}
    for backend in ("moments", "tensorly"):
        found[backend], _ = load_bases(stages(f"protocol.hosvd={backend}") / "cola.safetensors")
    for kind in KINDS:
        a, b = (found[backend][kind].V[:3].double() for backend in found)
        torch.testing.assert_close(a.T @ a, b.T @ b, rtol=0, atol=1e-4)


def test_run_takes_its_tasks_basis_from_a_folder_or_a_file_and_refuses_another(stages, config, tmp_path):
    def read(task="cola", *overrides, basis):
        return GlueProblem(config(*overrides) | {"basis": str(basis)}).bases(task)

    folder = stages()
    file = folder / "cola.safetensors"
    for place in (folder, file):
        bases, facts = read(basis=place)
        assert set(bases) == {"up", "down"} and facts["task"] == "cola"
    with pytest.raises(ValueError, match=r"cola.safetensors was made with task=cola, this run has task=mrpc: run the"):
        read("mrpc", basis=file)
    with pytest.raises(ValueError, match=r"was made with preliminary=.*'steps': 2.*this run has .*'steps': 5"):
        read("cola", "protocol.preliminary.steps=5", basis=file)
    with pytest.raises(ValueError, match=r"cola.safetensors was made with data=[0-9a-f]{64}, this run has data="):
        read("cola", "scale.train_examples=7", basis=file)
    save_bases(folder / "other.safetensors", bases, facts | {"seed": 99})
    with pytest.raises(ValueError, match=r"other.safetensors was made with seed=99, this run has seed=\d+: run"):
        read(basis=folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"mrpc.safetensors does not exist: run the stage that writes it"):
        read("mrpc", basis=folder)
    with pytest.raises(ValueError, match=r"cola.safetensors holds 'moments', not bases\."):
        read(basis=tmp_path / "gradients" / "tiny_bert")
    save_bases(folder / "other.safetensors", bases, facts | {"model_sha256": "0" * 64})
    text = r"other.safetensors was made with model_sha256=0{64}, this run has model_sha256=[0-9a-f]{64}: run the"
    with pytest.raises(ValueError, match=text):
        read(basis=folder / "other.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cola.safetensors is damaged, .*: run the stage that writes it again"):
        read(basis=file)


def test_basis_stage_refuses_what_holds_no_moments(stages, config, tmp_path):
    (tmp_path / "other" / "gradients").mkdir(parents=True)
    stages().rename(tmp_path / "other" / "gradients" / "tiny_bert")
    with pytest.raises(ValueError, match=r"cola.safetensors holds 'bases', not moments\."):
        basis_cell(Cell(GlueProblem(config()), ["cola"], [], tmp_path / "other"))
    assert not list((tmp_path / "other" / "basis").rglob("*.*"))


def test_basis_stage_refuses_gradients_with_a_changed_byte(stages, config, tmp_path):
    stages()
    file = tmp_path / "gradients" / "tiny_bert" / "cola.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"cola.safetensors is damaged, .*its content does not fit its checksum"):
        basis_cell(Cell(GlueProblem(config()), ["cola"], [], tmp_path))
