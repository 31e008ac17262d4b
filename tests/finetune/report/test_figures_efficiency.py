"""Figures of speed and memory: what is drawn is what the records hold, from records made up here."""

import json

import pytest

from finetune.report.evidence.efficiency_evidence import EfficiencyEvidence, Measured, TaskRecord
from finetune.report.figures import figures_efficiency as module
from finetune.report.figures.figures_efficiency import draw_figure_cost_curves, draw_figure_efficiency, looks_of
from finetune.report.labels import Labels
from finetune.store.catalog import MethodFacts

LABELS = Labels({"dora": MethodFacts("dora", "DoRA", "peft")})
LOOKS = looks_of(["full", "lora", "folded", "truncated_input", "floor"], LABELS)
NAMES = {name: look.label for name, look in LOOKS.items()}

FACTS = {
    "device": {"name": "a CPU", "type": "cpu", "threads": 1},
    "treatment": {"precision": "fp32", "batch_size": 32, "padding": "longest", "rounds": 2},
    "model": {"title": "MiniLM-L6"},
    "warnings": ["others ran beside it"],
}


def evidence(**tasks):
    """Task -> variant -> (ratios of the rounds, peak in training)."""
    found = {}
    for task, variants in tasks.items():
        measured = {name: Measured(ratios, ratios, peak, peak) for name, (ratios, peak) in variants.items()}
        found[task] = TaskRecord(f"results/{task}.json", measured, {}, FACTS)
    return EfficiencyEvidence("test", "sound", "minilm", found, ())


BOTH = {
    "cola": {"full": ((1.0, 1.0), 400.0), "lora": ((1.2, 1.4), 300.0), "folded": ((0.5, 0.7), 380.0)},
    "mrpc": {"full": ((1.0, 1.0), 800.0), "lora": ((1.0, 1.2), 700.0), "dora": ((2.0, 2.0), 400.0)},
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures of the module as they are saved: axes, and the words."""
    found = []
    real = module.save_figure

    def save(figure, folder, name, words):
        found.append((figure.axes, words))
        return real(figure, folder, name, words)

    monkeypatch.setattr(module, "save_figure", save)
    return found


def marks(axis, place):
    """x of every mark on a row of a panel; the line at full fine-tuning's 1 is none."""
    lines = [line for line in axis.lines if list(line.get_ydata()) != [0, 1]]
    return [float(x) for line in lines for x, y in zip(*line.get_data(), strict=True) if y == place]


def test_the_marks_are_means_over_tasks_with_the_tasks_beside(drawn, tmp_path):
    paths = draw_figure_efficiency(evidence(**BOTH), tmp_path, LABELS)
    assert [path.name for path in paths] == [f"figure_efficiency.{suffix}" for suffix in ("svg", "png", "json")]
    [((left, right), _words)] = drawn
    labels = [text.get_text() for text in left.get_yticklabels()]
    assert labels == [NAMES["full"], NAMES["lora"], NAMES["folded"], "DoRA"]
    tasks, mean = marks(left, 1)[:2], marks(left, 1)[-1]
    assert tasks == pytest.approx([1.3, 1.1]) and mean == pytest.approx(1.2)
    assert marks(right, 1) == pytest.approx([300 / 400, 700 / 800, 0.8125])
    assert [text.get_text() for text in right.texts] == ["1.00", "0.81", "0.95", "0.50"]
    low, high = marks(left, 1)[2:4]
    assert 1.0 <= low < 1.2 < high <= 1.4
    # The paper's ratio stands beside LoRA; it prints none of the folded form, and full fine-tuning's is 1.
    assert marks(left, 1.3) == pytest.approx([4.7 / 4.11]) and marks(left, 2.3) == [] == marks(left, 0.3)


def test_the_words_name_device_sizes_sources_and_what_is_missing(tmp_path):
    words = json.loads(draw_figure_efficiency(evidence(**BOTH), tmp_path, LABELS)[2].read_text())
    assert words["source"] == ["results/cola.json", "results/mrpc.json"]
    for text in ("a CPU (cpu, 1 threads)", "batch 32", "CoLA 1 steps/s, 400 MB", "CoLA, MRPC"):
        assert text in words["caption"]
    notes = " ".join(words["notes"])
    assert "Not measured on every task: SparseGrad, folded." in notes and "Warning: others ran beside it." in notes


def test_without_full_fine_tuning_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no finished record of full fine-tuning in test: run the efficiency stage"):
        draw_figure_efficiency(evidence(cola={"lora": ((1.0,), 1.0)}), tmp_path, LABELS)


# ---- cost curves ----


def point(k=10, tokens=8, hidden=4, factor=1.0):
    variants = {}
    for place, name in enumerate(("floor", "full", "lora", "rotated_regular", "folded", "truncated"), start=1):
        median = factor * place / 1000
        variants[name] = {"step_seconds": {"median": median, "q25": 0.9 * median, "q75": 1.1 * median}}
    pairs = {"folded_over_rotated_regular": {"mean": 0.625, "flop": 0.5}, "truncated_over_lora": {"mean": 2, "flop": 1}}
    where = {"hidden": hidden, "inner": 4 * hidden, "tokens": tokens, "density": 0.01, "decay": 0.0}
    return {"point": where, "k": k, "lora_rank": 2, "variants": variants, "pairs": pairs}


RECORD = {
    "run": {"kind": "cost_curves"},
    "device": FACTS["device"],
    "treatment": {"precision": "fp32", "rounds": 3, "clock": "cpu"},
    "warnings": [],
    "points": [point(), point(k=100, factor=2), point(tokens=16, factor=3), point(hidden=8, factor=4)],
    "base": 0,
    "decaying": 1,
    "curves": {"k": [0, 1], "tokens": [0, 2], "width": [0, 3]},
}


def test_a_variant_is_drawn_where_it_was_measured(drawn, tmp_path):
    points = [point(), point(k=100, factor=2), *RECORD["points"][2:]]
    points[1]["variants"]["truncated_input"] = points[1]["variants"]["folded"]
    draw_figure_cost_curves(RECORD | {"points": points, "base": 1}, "a.json", tmp_path, LABELS)
    [(axes, _)] = drawn
    [line] = [line for line in axes[0].lines if line.get_label() == NAMES["truncated_input"]]
    assert list(line.get_xdata()) == [100] and list(line.get_ydata()) == [10]


def test_every_curve_is_the_medians_of_its_points_in_milliseconds(drawn, tmp_path):
    draw_figure_cost_curves(RECORD, "results/test/cost_curves.json", tmp_path, LABELS)
    [(axes, words)] = drawn
    found = [{line.get_label(): line for line in axis.lines} for axis in axes]
    assert [list(lines[NAMES["lora"]].get_xdata()) for lines in found] == [[10, 100], [8, 16], [4, 8]]
    assert [list(lines[NAMES["lora"]].get_ydata()) for lines in found] == [[3, 6], [3, 9], [3, 12]]
    assert all(lines[NAMES["floor"]].get_linestyle() == "--" and len(lines) == 6 for lines in found)
    assert all(axis.get_xscale() == axis.get_yscale() == "log" for axis in axes)
    assert "folded over the paper's layer 0.62 (operations 0.50)" in words.caption
    assert "time that the process ran" in words.caption
    assert words.source == ("results/test/cost_curves.json",)


@pytest.mark.parametrize(
    ("changes", "text"), [({"run": {"kind": "efficiency"}}, "no cost curves"), ({"curves": None}, "curves")]
)
def test_another_record_is_refused(changes, text, tmp_path):
    record = {key: value for key, value in (RECORD | changes).items() if value is not None}
    with pytest.raises(ValueError, match=text):
        draw_figure_cost_curves(record, "a.json", tmp_path, LABELS)
