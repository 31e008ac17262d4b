"""The report page from files as the stages leave them: whole, self-contained, escaped, honest about gaps."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from finetune.published import discrepancies, table_numbers
from finetune.report.figures.figure_style import Words, new_figure, save_figure
from finetune.report.labels import Labels
from finetune.report.model import Cell, Note, Reason, Table, write_table
from finetune.report.page.context import page_context, to_html
from finetune.report.page.inputs import read_inputs
from finetune.store.catalog import MethodFacts

ROOT = Path(__file__).parents[3]
EVIL = '<script>alert("x")</script> & <b>'
EXPERIMENT = {
    "name": "test",
    "protocol": "sound",
    "scale": "smoke",
    "tasks": ["cola", "mrpc"],
    "methods": ["full", "dora"],
    "stands_for": {"bert_base": "tiny", "roberta_base": None, "roberta_large": None, "llama2_7b": None},
    "tables": [1, 9],
}
EXPECTED = {"figure_02": "gradients before and after", "figure_03": "stripes"}
LABELS = Labels(
    {"dora": MethodFacts("dora", f"DoRA {EVIL}", "peft"), "full": MethodFacts("full", "Regular FT", "full")}
)
NOT_RUN = Reason("no_run", "no finished run of tiny")
OTHER = Reason("other_model", "tiny is not bert")


def cell(row, column, value=None, **given):
    """Not comparable if it has a value, else not run."""
    state = {"verdict": "not comparable", "reasons": (OTHER,), "model": "tiny"}
    state = state if value is not None else {"verdict": "not run", "reasons": (NOT_RUN,)}
    return Cell(row, column, **{"quantity": "score", "value": value} | state | given)


SCORES = (
    cell("Regular FT", "CoLA", 61.25, method="full", low=60.0, high=62.5, n=3, paper="59.0", paper_std="1.9"),
    cell("Regular FT", "MRPC", method="full", paper="86.2", released=86.18),
    cell("Regular FT", "#Trainable Model", 1234567, method="full", quantity="trainable", paper="109 mln"),
    cell("Regular FT", EVIL, 60.0, method="full", paper="82.5", released=82.0, flags=("inferred",)),
    cell(f"DoRA {EVIL}", "CoLA", 50.0, method="dora", low=49.0, high=51.0, n=3),
    cell(f"DoRA {EVIL}", "MRPC", method="dora", paper="83.8"),
    cell(f"DoRA {EVIL}", "#Trainable Model", 1000, method="dora", quantity="trainable"),
    cell(f"DoRA {EVIL}", EVIL, 55.0, method="dora"),
)


def write_cells(results, name, cells, **given):
    number = int(name[-2:]) if name[-2:].isdigit() else None
    given = {"title": f"BERT {EVIL}", "experiment": "test", "protocol": "sound"} | given
    write_table(results / "tables" / f"{name}.json", Table(number, name, cells=tuple(cells), **given))


def record(method="full", seed=1, **changes):
    content = {
        "schema": 1,
        "status": "finished",
        "run": {"experiment": "test", "kind": "train", "model": "tiny", "method": method, "task": "cola", "seed": seed},
        "model": {"title": EVIL, "checkpoint": None, "revision": None, "sha256": "f" * 64, "random_weights": False},
        "data": {"task": "cola", "sha256": {"train": "e" * 64}, "rows": {"train": 100}},
        "provenance": {"commit": "a" * 40, "dirty": True, "packages": {"torch": "2.13.0"}, "python": "3.11.7"},
        "device": {"type": "cpu", "name": "2 CPU threads"},
        "treatment": {"padding": "longest", "max_steps": None},
        "training": {"seconds": 90.0, "step_seconds_median": 0.25},
        "memory": {"parameters": 4_000_000, "gradients": 1_500_000, "peak_evaluation": None},
    }
    return content | changes


def write_record(results, name, content):
    folder = results / "runs" / "tiny" / content["run"]["method"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    index = folder / "cell.json"
    listed = json.loads(index.read_text())["records"] if index.is_file() else []
    index.write_text(json.dumps({"records": [*listed, name]}))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    with new_figure(2, 2) as (figure, axes):
        axes[0, 0].set_xlabel("k & <entries>")
        for name in ("figure_02", "another"):
            words = Words(f"Title of {name} {EVIL}", f"Caption {EVIL}", (f"Note {EVIL}",), ("results/test/a.json",))
            save_figure(figure, folder, name, words)
    return folder


@pytest.fixture
def results(figures, tmp_path):
    """An experiment's folder with one table, two figures, two records and the examples."""
    results = tmp_path / "results" / "test"
    notes = (Note("warning", f"load {EVIL}"), Note("rule", "A rule of D2."))
    write_cells(results, "table_09", SCORES, models=(f"Tiny stands in {EVIL}.",), notes=notes)
    shutil.copytree(figures, results / "figures")
    write_record(results, "cola-seed1.json", record())
    write_record(results, "cola-seed2.json", record(seed=2))
    (results / "examples.html").write_text("<p>examples</p>")
    return results


def inputs(results, **changes):
    folders = {"GLUE": ROOT / "conf" / "protocol", "LLaMa-2": ROOT / "conf" / "protocol" / "llama"}
    protocols = {
        title: {path.stem: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))}
        for title, folder in folders.items()
    }
    given = {"experiment": EXPERIMENT, "labels": LABELS, "protocols": protocols, "expected": EXPECTED}
    return read_inputs(results, **given | changes)


def context(results, **changes):
    return page_context(inputs(results, **changes))


def texts(context, name):
    """Every text of a section's blocks."""
    [section] = [one for one in (*context["before"], *context["after"]) if one.id == name]
    found = []
    for block in section.blocks:
        rows = [[getattr(text, "text", text) for text in row] for row in getattr(block, "rows", ())]
        found += [*itertools.chain(*rows), *getattr(block, "texts", ()), getattr(block, "text", "")]
    return found


def has_row(found, row):
    """Whether the cells of a row stand in this order among the texts of a section."""
    place = found.index(row[0])
    return found[place : place + len(row)] == row


@pytest.fixture(params=["whole", "empty"])
def html(request, results):
    """The page of an experiment that has something, and of one that has nothing."""
    if request.param == "empty":
        shutil.rmtree(results)
        results.mkdir()
    return to_html(inputs(results))


def test_the_page_is_well_formed_and_its_links_lead_somewhere(html, results, whole):
    tree = whole(html)
    levels = [int(tag[1]) for tag in tree.names() if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert html == to_html(inputs(results))
    ids, targets = tree.values("id"), tree.values("href")
    inner = {target[1:] for target in targets if target.startswith("#")}
    assert len(ids) > 45 and inner and inner <= {*ids}
    (results / "tables").mkdir(exist_ok=True)
    (results / "tables" / "table_09.csv").touch()  # the table's stage writes it beside its JSON
    files = [target for target in targets if not target.startswith(("#", "https://arxiv.org/"))]
    assert all((results / target).exists() for target in files), files


def test_tables_are_readable_by_keyboard_and_screen_reader(html, whole):
    tree = whole(html)
    assert len(tree.cells) > 150 and all(cell.strip() for cell in tree.cells)
    assert all(attributes.get("scope") for tag, attributes in tree.tags if tag == "th")
    boxes = [attributes for _, attributes in tree.tags if attributes.get("class") == "scroll"]
    assert tree.names().count("table") == tree.names().count("caption") == len(boxes) > 1
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_every_text_is_escaped(results, whole):
    write_record(results, "cola-seed3.json", record("dora", 3, status="failed", error=EVIL))
    tree = whole(to_html(inputs(results)))
    shown = "".join(tree.texts)
    # Title, row and column of the table, its model and warning; title, caption and note of figures; record and failure.
    for part in (
        "BERT ",
        "DoRA ",
        "Tiny stands in ",
        "Warning: load ",
        "Title of another ",
        "Caption ",
        "Note ",
        "failed (",
    ):
        assert f"{part}{EVIL}" in shown, part
    assert shown.count(EVIL) > 12 and any(EVIL in one for one in tree.values("alt"))


def test_a_small_page_is_the_golden_one(results):
    """The section of a table, markup and all."""
    write_cells(results, "table_13", [cell("CoLA", "batch size", 16, quantity="batch_size", paper="32", released=32)],
                title="settings", notes=(Note("warning", "busy."), Note("rule", "See D14.")))  # fmt: skip
    html = to_html(inputs(results))
    found = re.search(r'<section aria-labelledby="table-13".*?</section>', html, re.S)[0]
    assert found + "\n" == Path(__file__).with_name("golden_table.html").read_text()


def test_every_table_of_the_paper_is_there_or_says_why_not(results, whole):
    write_cells(results, "decoder_two", SCORES[:1])
    found = context(results)
    listed = {name: layout if table is None else table.title for name, table, layout, _ in found["tables"]}
    assert [*listed] == [*(f"table_{number:02d}" for number in table_numbers()), "decoder_two"]
    assert listed["table_09"] == listed["decoder_two"] == f"BERT {EVIL}"
    assert "results/test/tables/table_01.json is missing: dvc repro tables@test" in listed["table_01"]
    assert "leaves it out; nothing runs in the place of RoBERTa-base" in listed["table_10"]
    assert listed["table_12"] in texts(found, "missing")
    shown = whole(to_html(inputs(results))).texts
    assert all(f"Table {number} " in shown for number in table_numbers()) and "Decoder two " in shown
    assert listed["table_12"] in shown


def test_a_table_has_ours_the_papers_and_the_logs_numbers(results):
    [(table, found)] = [(table, found) for _, table, found, _ in context(results)["tables"] if table]
    kinds = [kinds for _, kinds, _ in found["rows"]]
    assert kinds == [["ours", "paper", "logs"], ["ours", "paper"]] and not found["across"] and not found["long"]
    assert found["rows"][0][2] == list(table.cells[:4])
    assert found["counts"] == {"not comparable": 6, "not run": 2}
    assert found["reasons"]["not run: no finished run of tiny"] == "all rows (MRPC)"
    assert found["warnings"] == [f"load {EVIL}"] and found["notes"] == ["A rule of D2."]
    html = to_html(inputs(results))
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr class=.*?</tr>", html, re.S)]
    plain = [[re.sub(r"<[^>]+>", "", cell) for cell in line] for line in lines]
    assert plain[:3] == [
        ["61.25 n/c[60.00, 62.50]", "not run", "1,234,567 n/c", "60.00 n/c"],
        ["59.0 ± 1.9", "86.2", "109 mln", "82.5 inferred"],
        ["no log", "86.18", "no log", "82.00"],
    ]


def test_few_columns_stand_side_by_side_and_a_long_table_is_folded_away(results):
    write_cells(results, "table_08", [cell(f"method {place}", "CoLA", 1.5, paper="2") for place in range(15)])
    found = {name: layout for name, table, layout, _ in context(results)["tables"] if table}["table_08"]
    assert found["long"] and found["across"] and found["columns"] == [("CoLA", ["ours", "paper"])]
    html = to_html(inputs(results))
    assert "Show the 15 rows of Table 8" in html and '<td class="paper">2</td>' in html


def test_a_table_with_intervals_is_drawn(results):
    [(heading, table, [panel])] = context(results)["charts"]
    assert (heading, table.name, panel.title, panel.printed) == ("Table 9", "table_09", "CoLA", False)
    assert "Diamonds: printed" not in to_html(inputs(results))
    write_cells(results, "table_09", [replace(one, model="bert_base", paper="59.0") for one in SCORES])
    assert "Diamonds: printed" in to_html(inputs(results))


def test_figures_come_in_the_order_asked_for_with_the_differences_that_bear_on_them(results):
    found = context(results)
    assert [figure.name for figure, _ in found["figures"]] == ["figure_02", "another"]
    assert [bool(bearing) for _, bearing in found["figures"]] == [True, False]
    assert found["undrawn"] == ["figure_03 (stripes)"]
    bearing = {name: {row for row, _ in rows} for name, _, _, rows in found["tables"]}
    for one in discrepancies():
        assert (one["row"] in bearing["table_09"]) == ("9" in one["tables"].split()), one["row"]
    html = to_html(inputs(results))
    assert '<a href="#figure-02">Figure 2</a>' in html and '<a href="#figure-03">' not in html


def test_protocol_environment_and_cost_come_from_files_and_records(results):
    write_record(results, "cola-seed3.json", record("dora", 3, status="failed", error="out of memory"))
    (results / "runs" / "tiny" / "full" / "cola-seed9.json").write_text(json.dumps(record(seed=9)))  # in no cell
    found = context(results)
    assert found["facts"]["Finished records"] == 2 and found["facts"]["Cells with a value"] == "6 of 8"
    choices = {"orientation", "hosvd", "D2: U and V are called HOSVD factors", "preliminary: steps"}
    assert choices | {f"DoRA {EVIL}; Regular FT"} <= {*texts(found, "protocol")}
    facts = {"a" * 12, "yes", "2.13.0", "cpu, 2 CPU threads", "100 train rows"}
    assert facts <= {*texts(found, "environment")}
    rows = [["GLUE training: Regular FT", "tiny", "2", "3.0 min", "0.25"]]
    rows += [["Regular FT", "tiny", "4.00", "1.50", *["not counted"] * 3]]
    assert all(has_row(texts(found, "cost"), row) for row in rows)
    assert any(text.endswith("cola-seed3.json: failed (out of memory)") for text in texts(found, "missing"))


def test_cost_of_the_hosvd_is_measured_or_calculated(results):
    assert "Cost of the HOSVD: not run." in texts(context(results), "cost")
    entry = {"way": "streaming", "gradients": 30, "seconds": {"total": 1.25}, "peak_bytes": 2_000_000, "reason": None}
    other = {"way": "unfoldings", "gradients": 30, "reason": "over 1 GB", "calculated": {"seconds": 9.5, "bytes": 5e9}}
    case = {"name": "tiny", "shape": [256, 64], "entries": [entry, other]}
    content = record() | {"run": {"experiment": "test", "kind": "hosvd_cost"}, "cases": [case]}
    (results / "hosvd_cost.json").write_text(json.dumps(content))
    cost = texts(context(results), "cost")
    assert has_row(cost, ["streaming", "30", "1.25", "2.00", "measured"])
    assert has_row(cost, ["unfoldings", "30", "9.5", "5,000.00", "calculated: over 1 GB"])


def test_what_was_not_run_is_said(results):
    for path in (results / "figures" / "figure_02.json", results / "examples.html"):
        path.unlink()
    found = texts(context(results), "missing")
    for text in (
        "BERT itself: not run; tiny runs in its place",
        "LLaMa-2: not run; no model of experiment test stands in its place",
        "GLUE tasks not run: STSB, MNLI, QNLI",
        "Table 9: 2 of 8 cells not run",
        "Figure 'figure_02' (gradients before and after): not run",
        "Statistics: not run; results/test/statistics.json is missing",
        "Answers side by side (Appendix E): not run",
        f"GLUE training of DoRA {EVIL}: not run",
    ):
        assert sum(line.startswith(text) for line in found) == 1, text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: (folder / "tables" / "table_09.json").write_text('{"schema": 0}'), "no table of schema 1"),
        (lambda folder: (folder / "figures" / "another.json").write_text("{}"), "another.json is damaged"),
        (lambda folder: (folder / "figures" / "another.svg").unlink(), "another.svg"),
        (lambda folder: (folder / "statistics.json").write_text("{"), "statistics.json is damaged"),
        (lambda folder: shutil.rmtree(folder), "does not exist: run the experiment's stages first"),
    ],
)
def test_damaged_inputs_are_refused(change, text, results):
    change(results)
    with pytest.raises(ValueError, match=re.escape(text)):
        inputs(results)


def test_an_experiment_without_a_key_or_protocol_is_refused(results):
    with pytest.raises(ValueError, match="lacks scale"):
        inputs(results, experiment={key: value for key, value in EXPERIMENT.items() if key != "scale"})
    with pytest.raises(ValueError, match="protocol 'nope'; there are"):
        context(results, experiment=EXPERIMENT | {"protocol": "nope"})
