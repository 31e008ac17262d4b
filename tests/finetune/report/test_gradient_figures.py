"""Figures 2, 3 and of energy: what is drawn is what the records hold, and the words say it."""

from pathlib import Path

import pytest
import torch

from finetune.energy.spaces import SPACES
from finetune.report.figures import energy_figure, gradient_figures
from finetune.report.figures.energy_evidence import SPACES as DRAWN
from finetune.report.figures.energy_evidence import fully_tuned, of_model, read_looks, spread
from finetune.store import records
from sparsegrad import save_tensors

SHARES = [0.001, 0.01, 0.1]
LAYERS = [("up", 2), ("down", 0), ("up", 0), ("down", 2), ("up", 1), ("down", 1)]  # not in the order of the blocks


def energy(step, space, place):
    """A number for every place in a record, so that a mix-up shows."""
    return round(0.1 * SPACES.index(space) + 0.02 * place + 0.001 * step, 4)


def record(task, trajectory, steps=(0, 10)):
    def layer(step, space, place):
        value = energy(step, space, place)
        found = {"energy": [value / 2, value, 0.9], "energy_sd": [0.0] * 3, "rows": [0.1], "columns": [0.1]}
        return found | {"block": value / 4, "large": [0.3 + value / 10], "above": 0.0, "zero": 0.0, "norm": 1.0}

    def output(place):
        last = LAYERS[place][1] == 2
        shares = {"tokens": 40.0, "padding": 0.25, "zero_rows_padding": 0.25, "zero_rows": 0.9 if last else 0.25}
        return shares | {"nonzero": 0.1 if last else 0.75, "large_original": 0.4, "large_initial": 0.2}

    def look(step):
        spaces = {space: [layer(step, space, place) for place in range(6)] for space in SPACES}
        outputs = [output(place) for place in range(6)]
        return {"step": step, "score": 0.5 + step / 100, "loss": 0.7, "spaces": spaces, "output_gradients": outputs}

    return {
        "run": {"experiment": "t", "model": "m", "trajectory": trajectory, "task": task, "config_hash": f"{task}-hash"},
        "titles": {"model": "Little", "task": task.upper()},
        "metric": "accuracy",
        "padding": "longest",
        "training": {"learning_rate": 1e-4, "batch_size": 16},
        "spaces": list(SPACES),
        "measure": {"shares": SHARES, "stripe_shares": [0.1], "levels": [0.01], "judged_examples": 48},
        "refresh_batches": 30,
        "layers": [
            {"kind": kind, "layer": block, "name": f"{kind}.{block}", "shape": [8, 4], "block": [2, 2]}
            for kind, block in LAYERS
        ],
        "steps": [look(step) for step in steps],
        "nonzero_percent_of_training_steps": [{"10": 7} if block == 2 else {"70": 4, "80": 3} for _, block in LAYERS],
    }


@pytest.fixture
def folder(tmp_path):
    """Two tasks; the first with two trajectories."""
    for task, trajectory in (("mrpc", "full"), ("cola", "sparsegrad"), ("cola", "full")):
        path = tmp_path / f"{task}-{trajectory}.json"
        records.write_json(path, record(task, trajectory))
        maps = {f"step0.{s}.{kind}.1": torch.rand(8, 4).half() for s in SPACES for kind in ("up", "down")}
        rows = torch.rand(6, 4).half()
        rows[2:4] = 0
        maps |= {f"step0.output.initial.{kind}.{block}": rows.clone() for kind in ("up", "down") for block in (1, 2)}
        maps["step0.padding"] = torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.uint8)
        save_tensors(path.with_suffix(".safetensors"), maps, {"config_hash": f"{task}-hash"})
    return tmp_path


@pytest.fixture
def drawn(folder, monkeypatch):
    """``drawn(draw)``: the axes and words that a figure would be saved with."""

    def make(module, draw):
        caught = []
        monkeypatch.setattr(module, "save_figure", lambda figure, where, name, words: caught.append((figure, words)))
        draw(read_looks(folder, ["cola", "mrpc"]), "little", folder)
        [(figure, words)] = caught
        return figure.axes, words

    return make


def test_trajectories_come_in_the_order_of_the_tasks_and_the_fully_tuned_is_found(folder):
    looks = read_looks(folder, ["mrpc", "cola"])
    assert [look.path.stem for look in looks] == ["mrpc-full", "cola-full", "cola-sparsegrad"]
    assert fully_tuned(looks).path.stem == "mrpc-full" and fully_tuned(looks[2:]).path.stem == "cola-sparsegrad"
    assert [look.task for look in read_looks(folder, ["mrpc"])] == ["MRPC"]
    with pytest.raises(ValueError, match="no record of rte: run the energy stage"):
        read_looks(folder, ["rte"])


def test_values_follow_the_blocks(folder):
    look = read_looks(folder, ["cola"])[0]
    assert look.kinds == ["up", "down"] and look.blocks("up") == {0: 2, 1: 4, 2: 0}
    assert look.values(1, "initial", "up", "energy") == [energy(10, "initial", p) for p in (2, 4, 0)]
    assert look.values(0, "random", "down", "block") == [energy(0, "random", p) / 4 for p in (1, 5, 3)]
    look.record["measure"]["shares"] = [0.02]
    with pytest.raises(ValueError, match="no energy of the largest 1.00% of the entries; measured"):
        look.values(0, "random", "up", "energy")


def test_maps_of_another_configuration_are_refused(folder):
    look = read_looks(folder, ["cola"])[0]
    assert look.maps()["step0.padding"].tolist() == [0, 0, 1, 1, 0, 0]
    save_tensors(look.path.with_suffix(".safetensors"), {}, {"config_hash": "another"})
    look.record["maps_sha256"] = "0" * 64
    with pytest.raises(ValueError, match=r"is another file than was written with .*: run the energy stage again"):
        look.maps()
    del look.record["maps_sha256"]
    with pytest.raises(ValueError, match="another configuration"):
        look.maps()
    path = look.path.with_suffix(".safetensors")
    for change, text in ((lambda: path.write_bytes(b"x"), "is damaged"), (path.unlink, "does not exist")):
        change()
        with pytest.raises(ValueError, match=text):
            look.maps()


def test_the_energy_figure_draws_means_over_blocks(drawn):
    axes, words = drawn(energy_figure, energy_figure.draw_figure_energy)
    assert len(axes) == 3 * 4
    lines = {line.get_label(): line for line in axes[1].get_lines()}  # the first task's first trajectory, down
    assert set(lines) == {space.label for space in DRAWN.values()}
    for space in SPACES:
        expected = [sum(energy(step, space, p) for p in (1, 3, 5)) / 3 for step in (0, 10)]
        assert lines[DRAWN[space].label].get_ydata() == pytest.approx(expected)
        assert list(lines[DRAWN[space].label].get_xdata()) == [0, 10]
    block = axes[2].get_lines()[0].get_ydata()
    assert block == pytest.approx([sum(energy(step, "original", p) / 4 for p in (0, 2, 4)) / 3 for step in (0, 10)])
    assert "30 batches" in words.caption and "2x2" in words.caption and "standard deviation" in words.caption
    assert words.notes[0] == "Little stands in BERT's place: it is no BERT, and its numbers are not the paper's."
    ends = [spread([energy(step, "initial", p) for p in (1, 5, 3)]) for step in (0, 10)]
    [note] = [n for n in words.notes if n.startswith("COLA, SparseGrad, down, largest 1 % of the entries")]
    assert f"{DRAWN['initial'].label} {ends[0]} to {ends[1]}" in note
    assert "accuracy 0.500 (step 0), 0.600 (step 10)" in words.notes[-1]
    assert [Path(path).name for path in words.source] == ["cola-full.json", "cola-sparsegrad.json", "mrpc-full.json"]


def test_figure_2_draws_the_block_of_the_maps(drawn):
    axes, words = drawn(gradient_figures, gradient_figures.draw_figure_02)
    [curves] = [axis for axis in axes[:4] if axis.get_xlabel().startswith("share of the entries")]
    lines = {line.get_label(): line.get_ydata() for line in curves.get_lines()}
    place = 4  # up, block 1
    assert lines[DRAWN["stored"].label][1] == energy(0, "stored", place) and DRAWN["refreshed"].label not in lines
    assert f"up: {energy(0, 'original', 4):.2f} original, {energy(0, 'initial', 4):.2f} HOSVD core" in words.caption
    assert "block 1 (counted from 0)" in words.caption and "COLA, step 0" in words.caption
    assert [axis.get_title() for axis in axes[:3]] == list(gradient_figures.MAPS.values())


def test_figure_3_tells_padding_from_the_last_block(drawn):
    axes, words = drawn(gradient_figures, gradient_figures.draw_figure_03)
    assert "25% of the rows are padding" in words.caption and "0.0% of the rows are zero" in words.caption
    assert "in the last block 65%" in words.caption and "0.00 ± 0.00" in words.notes[1]
    image = axes[0].get_images()[0].get_array()
    assert image.mask[2:4].all() and not image.mask[[0, 1, 4, 5]].any()
    bars = sorted(float(bar.get_y()) + float(bar.get_height()) for bar in axes[0].patches)
    assert bars == pytest.approx([1 - 3 / 6, 1 - 2 / 6])
    heights = [(round(bar.get_x()), bar.get_height()) for bar in axes[2].patches if bar.get_height()]
    assert sorted(heights) == [(10, 7), (70, 8), (80, 6)]
    lines = [list(line.get_ydata()) for line in axes[3].get_lines()]
    assert lines[0] == pytest.approx([100 * (0.75 + 0.75 + 0.1) / 3] * 2)
    assert lines[2][0] == pytest.approx(sum(30 + 10 * energy(0, "original", p) for p in (0, 2, 4)) / 3)


def test_a_model_of_the_paper_is_called_so(folder):
    look = read_looks(folder, ["cola"])[0]
    assert of_model(look, "bert_base") == "Model: Little."
    assert set(DRAWN) == set(SPACES)


@pytest.mark.parametrize("draw", [gradient_figures.draw_figure_02, gradient_figures.draw_figure_03])
def test_missing_maps_are_said(draw, folder):
    looks = read_looks(folder, ["cola"])
    save_tensors(looks[0].path.with_suffix(".safetensors"), {}, {"config_hash": "cola-hash"})
    with pytest.raises(ValueError, match="no heat map step0.* run the energy stage again"):
        draw(looks, "little", folder)
