"""Figures of scores: any method, family and task of the data is drawn, at its place and in its colour."""

import pytest

from finetune.report.figures import table_panels as module
from finetune.report.figures.figure_style import COLOURS, GREY
from finetune.report.figures.scores_figure import NATS, draw_scores, panels
from finetune.report.figures.table_panels import table_panels
from finetune.report.labels import Labels
from finetune.report.model import Cell, Reason, Table
from finetune.store.catalog import MethodFacts

LABELS = Labels(
    {
        name: MethodFacts(name, label, base, control, extends)
        for name, label, base, control, extends in (
            ("full", "Regular FT", "full", False, ""),
            ("lora", "LoRA", "lora", False, ""),
            ("dora", "DoRA", "peft", False, ""),
            ("sparsegrad", "SparseGrad", "sparsegrad", False, ""),
            ("truncated", "Truncated", "sparsegrad", False, ""),
            ("fresh", "Fresh", "sparsegrad", False, "truncated"),
            ("frozen", "Frozen", "full", True, ""),
        )
    },
    {"cola": "CoLA", "ninth": "Ninth"},
)


def pair(first, second, value=1.0, **tasks):
    def test(value):
        return {"difference": {"value": value, "low": value - 2, "high": value + 2}}

    return {"first": first, "second": second, "mean": test(value), "tasks": {t: test(v) for t, v in tasks.items()}}


def content(*families, decoders=()):
    comparison = {"families": [{"name": name, "pairs": pairs} for name, pairs in families], "methods": {}}
    entry = {"title": "Tiny", "model": "tiny", "comparison": comparison}
    return {"experiment": "test", "protocol": "sound", "runs": [entry], "decoders": [*decoders], "logs": []}


METHODS = (
    "methods",
    [pair("sparsegrad", "dora", 1.0, ninth=2.0, cola=-9.0), pair("sparsegrad", "full", -3.0), pair("dora", "full")],
)
VARIANTS = ("any name", [pair("fresh", "sparsegrad"), pair("truncated", "sparsegrad")])
CONTROL = ("another", [pair("sparsegrad", "frozen"), pair("lora", "frozen")])
MIXED = ("mixed", [pair("sparsegrad", "lora"), pair("fresh", "full")])


def test_families_are_read_from_their_pairs_and_not_from_names():
    [found, [], []] = panels(content(METHODS, VARIANTS, CONTROL, MIXED, ("empty", [])), LABELS)
    assert [panel.title.partition("\n")[2] for panel in found] == [
        "SparseGrad minus ...", "... minus SparseGrad", "... minus Frozen", "mixed",
    ]  # fmt: skip
    assert [[line.text for line in panel.lines] for panel in found] == [
        ["DoRA, AVG", "CoLA", "Ninth", "Regular FT"],
        ["Fresh", "Truncated"],
        ["SparseGrad", "LoRA"],
        ["SparseGrad − LoRA", "Fresh − Regular FT"],
    ]
    assert [line.difference["value"] for line in found[0].lines] == [1.0, -9.0, 2.0, -3.0]
    colours = [[line.colour for line in panel.lines] for panel in found]
    assert colours[0][0] not in COLOURS.values() and colours[0][3] == COLOURS["full"]
    assert colours[1:3] == [[COLOURS["truncated"]] * 2, [GREY] * 2]


def test_a_decoders_losses_and_an_experiment_without_sparsegrad_are_drawn(tmp_path):
    loss = pair("dora", "lora", oasst1=-0.1)
    loss["mean"]["difference"] |= {"low": None, "high": None}
    decoder = {"title": "Chat", "comparison": {"families": [{"name": "methods", "pairs": [loss]}]}}
    drawn = content(("methods", [pair("dora", "lora", cola=1.0)]), decoders=[decoder])
    [[own], [losses], []] = panels(drawn, LABELS)
    assert own.title.endswith("DoRA minus ...") and (losses.unit, losses.lines[0].text) == (NATS, "LoRA")
    svg, _, words = draw_scores(drawn, tmp_path, ["statistics.json"], LABELS)
    assert "Chat, our runs" in svg.read_text() and "Validation losses" in words.read_text()


# ---- the panels of a table ----


def cell(row, column="CoLA", value=60.0, quantity="score", **given):
    return Cell(row, column, quantity, value=value, **{"low": value - 1, "high": value + 1, "method": row} | given)


@pytest.fixture
def draw(monkeypatch):
    """``draw(cells)``: the panels of a table, and the axis of each."""

    def make(cells, number=9):
        axes = []
        monkeypatch.setattr(module, "draw_svg", lambda figure: axes.extend(figure.axes) or b"")
        return table_panels(Table(number, "table", "t", "test", "sound", tuple(cells)), LABELS), axes

    return make


def marks(axis, marker):
    return [(*line.get_xdata(), *line.get_ydata()) for line in axis.lines if line.get_marker() == marker]


@pytest.mark.parametrize(("model", "printed"), [("bert_base", True), ("tiny", False)])
def test_the_print_and_the_logs_stand_where_the_papers_model_ran(draw, model, printed):
    given = {"paper": "58.4", "released": 58.0, "model": model}
    [panel], [axis] = draw([cell("full", **given), cell("dora", value=50.0), cell("full", "one alone")])
    assert (panel.title, panel.unit, panel.printed) == ("CoLA", "%", printed)
    assert panel.words == "full 60.00, 95 % interval 59.00 to 61.00; dora 50.00, 95 % interval 49.00 to 51.00"
    assert marks(axis, "o") == [(60.0, 0), (50.0, 1)]
    assert [marks(axis, "D"), marks(axis, "^")] == ([[(58.4, 0)], [(58.0, 0)]] if printed else [[], []])


def test_panels_of_a_table_have_the_same_rows_and_an_average_over_fewer_tasks_is_left_out(draw):
    rows = [cell(row, column) for row in ("full", "lora", "dora") for column in ("CoLA", "Ninth")][:-1]
    averages = [cell(row, "AVG", quantity="average") for row in ("full", "lora", "dora")]
    found, axes = draw([*rows, *averages])
    assert [panel.title for panel in found] == ["CoLA", "Ninth", "AVG"]
    assert all([text.get_text() for text in axis.get_yticklabels()] == ["full", "lora", "dora"] for axis in axes)
    assert [[y for _, y in marks(axis, "o")] for axis in axes] == [[0, 1, 2], [0, 1], [0, 1]]


def test_units_say_what_a_value_is_no_measure_of(draw):
    bad = {"reasons": (Reason("no_quality", "a rule judged"),), "quantity": "judged"}
    found, _ = draw([cell("full", "Loss", quantity="loss"), cell("dora", "Loss", quantity="loss"),
                     cell("full", "Bench", **bad), cell("dora", "Bench", **bad)])  # fmt: skip
    assert [panel.unit for panel in found] == ["nats a token, lower is better", "1 to 10, no measure of quality"]


@pytest.mark.parametrize("quantity", ["speed", "average", "trainable"])
def test_speed_averages_alone_and_counts_are_not_drawn(draw, quantity):
    assert draw([cell("full", quantity=quantity), cell("dora", quantity=quantity)]) == ([], [])
