"""Energy of gradients: measures against sorting by hand, probes that touch nothing, cells that resume."""

import itertools
import json
from copy import deepcopy

import pytest
import torch

from finetune.energy.cell import energy_cell
from finetune.energy.measures import MeasureOptions, average, energy_in_largest, measure, pool
from finetune.energy.probe import Probe, Rows
from finetune.energy.spaces import SPACES, rotations
from finetune.energy.trajectory import follow
from finetune.runs import cells, preliminary
from finetune.store.files import sha256
from finetune.training.processes import make_accelerator
from sparsegrad import GradientMoments, hosvd, load_tensors, random_basis

CPU = torch.device("cpu")
OPTIONS = MeasureOptions(shares=(0.01, 0.1, 0.5), stripe_shares=(0.1, 0.5), levels=(0.1, 0.5), threshold=1e-3)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Measures


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_measures_are_those_of_a_sorted_list(dtype):
    G = random(12, 20).pow(3)
    G[3] = 0.0
    G[5, 5] = 1e-4
    found = measure(G.to(dtype), (2, 5), OPTIONS)
    values = sorted((value**2 for value in G.flatten().tolist()), reverse=True)
    total = sum(values)
    assert found.energy == pytest.approx([sum(values[:n]) / total for n in (2, 24, 120)])
    by_row = sorted((sum(v**2 for v in row) for row in G.tolist()), reverse=True)
    by_column = sorted((sum(v**2 for v in column) for column in G.T.tolist()), reverse=True)
    assert found.rows == pytest.approx([sum(by_row[:n]) / total for n in (1, 6)])
    assert found.columns == pytest.approx([sum(by_column[:n]) / total for n in (2, 10)])
    assert found.block == pytest.approx(sum(v**2 for row in G[:2, :5].tolist() for v in row) / total)
    sizes = [abs(v) for v in G.flatten().tolist()]
    assert found.large == pytest.approx([sum(v >= p * max(sizes) for v in sizes) / 240 for p in (0.1, 0.5)])
    assert found.zero == pytest.approx(20 / 240)
    assert found.above == pytest.approx(sum(v > 1e-3 for v in sizes) / 240) and found.above < 1 - found.zero
    assert found.norm == pytest.approx(total**0.5)


def test_all_entries_hold_all_energy_and_at_least_one_is_taken():
    squares = random(7).square()
    found = energy_in_largest(squares, (0.001, 1.0))
    assert found[0] == pytest.approx(float(squares.max() / squares.sum())) and found[1] == 1.0


def test_energy_survives_the_smallness_of_real_gradients():
    G = random(8, 8)
    assert measure((1e-25 * G).float(), (2, 2), OPTIONS).energy == pytest.approx(measure(G, (2, 2), OPTIONS).energy)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_matrix_without_shares_is_refused(value):
    with pytest.raises(ValueError, match="no share of it is defined"):
        measure(torch.full((2, 2), value), (1, 1), OPTIONS)


def test_averages_over_batches():
    found = [measure(random(6, 6, seed=seed), (2, 2), OPTIONS) for seed in range(3)]
    mean = average(found)
    energies = torch.tensor([one.energy for one in found], dtype=torch.float64)
    assert mean["energy"] == pytest.approx(energies.mean(0).tolist(), rel=1e-4)
    assert mean["energy_sd"] == pytest.approx(energies.std(0).tolist(), rel=1e-4)
    assert mean["norm"] == pytest.approx(sum(one.norm for one in found) / 3, rel=1e-4)
    assert average(found[:1])["energy_sd"] is None


def test_a_picture_is_the_largest_of_each_tile():
    G = random(8, 6).float()
    tiles = G.abs().reshape(4, 2, 3, 2).amax(dim=(1, 3)) / G.abs().max()
    assert torch.equal(pool(G, 4, 3), tiles.half())
    assert torch.equal(pool(G, 64, 64), (G.abs() / G.abs().max()).half())
    assert pool(torch.zeros(5, 5), 2, 2).sum() == 0


# Spaces


@pytest.fixture
def low_rank():
    """Gradients A S_t B of rank 3, and the HOSVD basis of others of the same A and B."""
    A, B = random(24, 3, seed=1), random(3, 16, seed=2)
    moments = GradientMoments(24, 16)
    for seed in range(10, 16):
        moments.update(A @ random(3, 3, seed=seed) @ B)
    return A @ random(3, 3, seed=99) @ B, hosvd(moments)


def test_the_core_of_low_rank_gradients_is_concentrated_and_a_random_basis_spreads(low_rank):
    G, basis = low_rank
    bases = {
        "initial": {"up": basis},
        "released": {"up": basis.oriented("released")},
        "random": {"up": random_basis(basis, torch.Generator().manual_seed(0))},
    }
    found = {s: measure(M, (3, 3), OPTIONS) for s, M in rotations(G, bases, "up").items()}
    assert list(found) == ["original", "random", "released", "initial"]
    assert all(one.norm == pytest.approx(float(G.norm())) for one in found.values())
    assert found["initial"].block == pytest.approx(1.0)
    for space in ("original", "random", "released"):
        assert found[space].block < 0.3 and found[space].energy[0] < found["initial"].energy[0]
    # An isotropic matrix: the largest tenth of normal values holds 44 % of their squares.
    assert found["random"].energy[1] == pytest.approx(0.5, abs=0.15)


def test_rotations_are_the_formulas(low_rank):
    G, basis = low_rank
    found = rotations(G, {"initial": {"up": basis}, "released": {"up": basis.oriented("released")}}, "up")
    assert torch.equal(found["original"], G)
    assert torch.allclose(found["initial"], basis.V @ G @ basis.U.T)
    assert torch.allclose(found["released"], basis.V @ G @ basis.U)


# Probe


@pytest.fixture
def probe(build, load, random_bases):
    """``probe("full")``: of the tiny checkpoint on CoLA, two judged batches of four."""

    def make(name, **changes):
        values = {
            "method": build(name),
            "split": load("cola")[1]["train"],
            "judged": [[0, 1, 2, 3], [4, 5, 6, 7]],
            "refreshing": list(range(8, 24)),
            "stored": random_bases(),
            "options": OPTIONS,
            "budget": (None, 0.05),
            "batch_size": 8,
            "refresh_batches": 2,
            "seed": 5,
            "picture": (16, 8),
        }
        return Probe(**values | changes)

    return make


@pytest.mark.parametrize("name", ["full", "sparsegrad"])
def test_a_look_touches_nothing(name, probe, classifier):
    look = probe(name)
    model = look.method.prepare(classifier()).train()
    state, flags = deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    look.look(model, CPU, pictures=True)
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["full", "sparsegrad"])
def test_a_look_measures_the_gradients_of_the_plain_model(name, probe, classifier):
    look = probe(name)
    model = classifier(dropout=False)
    numbers, pictures = look.look(look.method.prepare(deepcopy(model)), CPU, pictures=True)
    assert list(numbers["spaces"]) == list(SPACES)
    layers = [(t.kind, t.layer, t.module) for t in look.method.targets.find(model)]
    expected, losses = [[] for _ in layers], []
    for rows in look.judged:
        batch = look.split.batch(rows)
        labels = batch.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        losses.append(float(loss.detach()))
        for place, gradient in enumerate(torch.autograd.grad(loss, [m.weight for _, _, m in layers])):
            expected[place].append(gradient)
    assert numbers["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    for space in ("original", "stored"):
        for place, (kind, layer, _) in enumerate(layers):
            G = [g if space == "original" else look.stored[kind].rotate(g) for g in expected[place]]
            shape = tuple(G[0].shape)
            by_hand = average([measure(g, look.ranks(shape), OPTIONS) for g in G])
            found = numbers["spaces"][space][place]
            assert found["energy"] == pytest.approx(by_hand["energy"], rel=1e-2)
            assert found["block"] == pytest.approx(by_hand["block"], rel=1e-2)
            if layer == 0:  # the middle of two blocks
                assert torch.allclose(pictures[f"{space}.{kind}.0"], pool(G[0], 16, 8), atol=5e-3)
    assert look.ranks((64, 32)) == (10, 10)  # 5 % are 102 entries


def test_the_first_basis_stays_the_initial_one(probe, classifier):
    look = probe("full")
    model = classifier(dropout=False)
    first, _ = look.look(model, CPU, pictures=False)
    assert first["spaces"]["initial"] == first["spaces"]["refreshed"] != first["spaces"]["stored"]
    assert first["refreshed_with"] == {"up": 4, "down": 4}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    later, pictures = look.look(model, CPU, pictures=False)
    assert later["spaces"]["initial"] != later["spaces"]["refreshed"] and not pictures
    again = probe("full")
    assert again.look(model, CPU, pictures=False)[0]["spaces"]["refreshed"] == later["spaces"]["refreshed"]


def test_output_gradients_tell_padding_from_text(probe, classifier, load):
    split = load("cola", padding="max_length")[1]["train"]
    look = probe("full", split=split)
    numbers, pictures = look.look(classifier(dropout=False), CPU, pictures=True)
    lengths = [len(split.input_ids[row]) for rows in look.judged for row in rows]
    padding = 1 - sum(lengths) / (8 * 32)
    targets = look.method.targets.find(classifier())
    for target, found in zip(targets, numbers["output_gradients"], strict=True):
        assert found["padding"] == pytest.approx(padding, abs=1e-4)
        assert found["zero_rows_padding"] == pytest.approx(padding, abs=1e-4)
        # The last block's other tokens are read by no one.
        expected = 1 - 8 / (8 * 32) if target.layer == 1 else padding
        assert found["zero_rows"] == pytest.approx(expected, abs=1e-4)
        assert found["nonzero"] <= 1 - found["zero_rows"] + 1e-4
    assert pictures["padding"].tolist()[: lengths[0] + 1] == ([0] * lengths[0] + [1])[:16]
    assert pictures["output.initial.up.1"].shape == (16, 8)


def test_judged_rows_may_not_make_the_basis(probe):
    with pytest.raises(ValueError, match="judged on others"):
        probe("full", refreshing=[3, 30])
    with pytest.raises(ValueError, match="no batch to judge"):
        probe("full", judged=[])


def test_rows_of_a_split_are_a_split(load):
    split = load("cola")[1]["train"]
    rows = Rows(split, [4, 2, 9])
    assert len(rows) == 3 and rows.longest == split.longest and rows.targets([0, 1]) == 2
    assert torch.equal(rows.batch([2, 0])["input_ids"], split.batch([9, 4])["input_ids"])


# Trajectory


@pytest.fixture
def followed(probe, classifier, options):
    def make(name, steps, precision="fp32", **changes):
        look = probe(name, **changes)
        model = look.method.prepare(classifier())
        chosen = options(max_steps=max(1, steps[-1]), precision=precision)
        optimizer = look.method.optimizer(model, chosen.learning_rate, 0.0)
        accelerator = make_accelerator("cpu", precision)
        found = follow(model, optimizer, look, steps, chosen, accelerator, score=lambda m: 0.5)
        return found, look.method.merge(model)

    return make


@pytest.mark.parametrize("name", ["full", "sparsegrad"])
def test_looking_does_not_change_where_training_goes(name, followed):
    often, first = followed(name, [0, 1, 3, 5])
    seldom, second = followed(name, [5])
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert [look["step"] for look in often.steps] == [0, 1, 3, 5]
    for space in ("original", "stored", "random", "refreshed"):  # the initial basis is another
        assert often.steps[-1]["spaces"][space] == seldom.steps[-1]["spaces"][space]
    assert often.steps[0]["loss"] != often.steps[-1]["loss"]
    assert {name.split(".")[0] for name in often.pictures} == {"step0", "step5"}


@pytest.mark.parametrize("name", ["full", "sparsegrad"])
def test_every_training_step_is_counted_in_every_layer(name, followed):
    found, _ = followed(name, [0, 2, 6])
    assert len(found.nonzero) == 4
    for counts in found.nonzero:
        assert sum(counts.values()) == 6 and all(0 <= int(percent) <= 100 for percent in counts)


def test_a_look_is_in_float32_while_training_is_in_bfloat16(followed):
    first = [followed("full", [0], precision=precision)[0].steps[0]["spaces"] for precision in ("fp32", "bf16")]
    assert first[0] == first[1]


@pytest.mark.parametrize("steps", [[], [3, 3], [5, 2], [-1, 4]])
def test_steps_out_of_order_are_refused(steps):
    with pytest.raises(ValueError, match="they must rise"):
        follow(None, None, None, steps, None, None, score=None)


# Cell


@pytest.fixture
def energy_config(compose, tiny_checkpoint, glue_root, config, tmp_path):
    """``energy_config("scale.batches=1", ...)``: three looks in four steps; bases made as the stages make them."""
    glue = config()
    cell = cells.Cell(cells.make_problem(glue), ["cola", "stsb"], [], tmp_path)
    preliminary.gradients_cell(cell)
    preliminary.basis_cell(cell)

    def make(*overrides):
        found = compose(
            "model=tiny_bert",
            f"model.checkpoint={tiny_checkpoint}",
            f"data.root={glue_root}",
            "protocol.preliminary.steps=2",
            "protocol.preliminary.batch_size=8",
            "protocol.density=0.05",
            "scale=energy/smoke",
            "scale.steps=[0,2,4]",
            "scale.batch_size=4",
            "scale.refresh_batches=2",
            "device=cpu",
            "progress=false",
            *overrides,
            config_name="energy",
        )
        return found | {"basis": str(tmp_path / "basis" / "tiny_bert"), "checkpoints": str(tmp_path / "checkpoints")}

    return make


def test_a_cell_writes_records_and_goes_on(energy_config, tmp_path, caplog):
    folder, found = tmp_path / "energy", energy_config()
    energy_cell(found, ["cola", "stsb"], folder)
    kinds = itertools.product(("cola", "stsb"), ("full", "sparsegrad"), ("json", "safetensors"))
    names = {f"{task}-{name}.{end}" for task, name, end in kinds}
    assert {path.name for path in folder.iterdir()} == names
    record = json.loads((folder / "cola-full.json").read_text())
    assert record["run"]["trajectory"] == "full" and record["metric"] == "matthews_correlation"
    assert [step["step"] for step in record["steps"]] == [0, 2, 4] and record["spaces"] == list(SPACES)
    assert [layer["kind"] for layer in record["layers"]] == ["up", "down", "up", "down"]
    for step in record["steps"]:
        for space in SPACES:
            assert len(step["spaces"][space]) == len(record["layers"])
            assert len(step["spaces"][space][0]["energy"]) == len(record["measure"]["shares"])
    tensors, facts = load_tensors(folder / "cola-full.safetensors")
    assert facts["config_hash"] == record["run"]["config_hash"]
    assert {"step0.initial.up.0", "step4.original.down.0", "step0.output.initial.up.1"} <= set(tensors)
    assert all((folder / name).stat().st_size < 300_000 for name in names)
    before = {path: path.read_bytes() for path in folder.glob("cola-*")}
    assert record["maps_sha256"] == sha256(folder / "cola-full.safetensors")
    flipped = folder / "stsb-full.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"x")
    (folder / "old-full.json").write_text("{}")
    with caplog.at_level("INFO"):
        energy_cell(found, ["cola", "stsb"], folder)
    assert caplog.text.count("is finished, reused") == 3 and not (folder / "old-full.json").exists()
    assert {path: path.read_bytes() for path in before} == before
    energy_cell(energy_config("scale.learning_rate=0.01", "scale.trajectories=[full]"), ["cola"], folder)
    assert {path.name for path in folder.iterdir()} == {"cola-full.json", "cola-full.safetensors"}
    changed = json.loads((folder / "cola-full.json").read_text())
    assert changed["steps"][0] == record["steps"][0] and changed["steps"][-1] != record["steps"][-1]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["scale.trajectories=[nope]"], "trajectories names 'nope'; allowed: full, sparsegrad"),
        (["scale.batches=100"], "lower scale.batches"),
        (["scale.steps=[2,1]"], "must rise"),
        (["scale.learning_rate=1e30"], "not finite|nan|norm"),
    ],
)
def test_wrong_input(overrides, text, energy_config, tmp_path):
    with pytest.raises(ValueError, match="needs bases: run the gradients"):
        energy_cell(energy_config() | {"basis": None}, ["cola"], tmp_path / "energy")
    with pytest.raises(ValueError, match=text):
        energy_cell(energy_config(*overrides), ["cola"], tmp_path / "energy")
    assert not list((tmp_path / "energy").glob("*"))
