"""The report page from files as the stages leave them: whole, self-contained, escaped, honest about gaps."""

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from finetune.published import discrepancies, table_numbers
from finetune.report.figures.figure_style import Words, new_figure, save_figure
from finetune.report.page.page import to_html
from finetune.report.page.page_inputs import read_inputs
from finetune.report.tables.rows import COLUMNS
from finetune.report.tables.writers import Context, write_table

ROOT = Path(__file__).parents[3]
EVIL = '<script>alert("x")</script> & <b>'
EXPERIMENT = {
    "name": "test",
    "protocol": "sound",
    "scale": "smoke",
    "tasks": ["cola", "mrpc"],
    "stands_for": {"bert_base": "tiny", "roberta_base": None, "roberta_large": None, "llama2_7b": None},
    "tables": {f"table_{number:02d}": ["test"] for number in (1, 9)} | {"table_10": []},
}
EXPECTED = {"figure_02": "gradients before and after", "figure_03": "stripes"}
VOID = {"meta", "br", "hr", "!doctype"}


def row(label, column, ours=None, **given):
    values = dict.fromkeys(COLUMNS, "") | {"row": label, "column": column, "ours": ours}
    values |= {"ours_low": None, "ours_high": None, "n": None, "released": None, "protocol": "sound"}
    values |= {"verdict": "not run" if ours is None else "not comparable"}
    values |= {"source": "no finished run of tiny" if ours is None else "ours: x; not comparable: tiny is not bert"}
    return values | given


def write_scores(results, **context):
    """Table 9 with two methods and four columns: run, not run, not printed, logged."""
    rows = [
        row("Regular FT", "CoLA", 61.25, ours_low=60.0, ours_high=62.5, n=3, paper="59.0", paper_std="1.9"),
        row("Regular FT", "MRPC", paper="86.2", released=86.18),
        row("Regular FT", "#Trainable Model", 1234567, paper="109 mln"),
        row("Regular FT", "AVG", 60.0, paper="82.5", released=82.0),
        row(EVIL, "CoLA", 50.0, ours_low=49.0, ours_high=51.0, n=3),
        row(EVIL, "MRPC", paper="83.8"),
        row(EVIL, "#Trainable Model", 1000),
        row(EVIL, "AVG", 55.0),
    ]
    given = {"experiment": "test", "protocol": "sound", "title": f"BERT {EVIL}", "models": ("Tiny stands in.",)}
    return write_table(results / "tables", 9, rows, Context(**given | context))


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
    """A folder with two figures that share matplotlib's ids and style."""
    folder = tmp_path_factory.mktemp("figures")
    with new_figure(4, 3, 1, 2) as (figure, axes):
        axes[0, 0].plot([0, 1], [0, 1], marker="o")
        axes[0, 0].set_xlabel("k & <entries>")
        axes[0, 1].imshow([[0, 1], [2, 3]])
        for name in ("figure_02", "another"):
            words = Words(f"Title of {name} {EVIL}", f"Caption {EVIL}", (f"Note {EVIL}",), ("results/test/a.json",))
            save_figure(figure, folder, name, words)
    return folder


@pytest.fixture
def results(figures, tmp_path):
    """An experiment's folder with one table, two figures, two records and the examples."""
    results = tmp_path / "results" / "test"
    write_scores(results)
    shutil.copytree(figures, results / "figures")
    write_record(results, "cola-seed1.json", record())
    write_record(results, "cola-seed2.json", record(seed=2))
    (results / "examples.html").write_text("<p>examples</p>")
    return results


def protocols():
    folder = ROOT / "conf" / "protocol"
    return {
        title: {path.stem: yaml.safe_load(path.read_text()) for path in sorted(where.glob("*.yaml"))}
        for title, where in {"GLUE": folder, "LLaMa-2": folder / "llama"}.items()
    }


def page(results, **changes):
    given = {"experiment": EXPERIMENT, "protocols": protocols(), "expected": EXPECTED}
    return to_html(read_inputs(results, **given | changes))


class Tree(HTMLParser):
    """Checks that tags are balanced; keeps tags with attributes, texts by the section they are in, and table cells."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.cells, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def values(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def section(html, name):
    """The part of the page below a heading."""
    return re.search(
        rf'<section aria-labelledby="{name}".*?(?=<section aria-labelledby="[a-z]+" class="part">|</main>)', html, re.S
    )[0]


def test_nothing_is_loaded_and_nothing_runs(results):
    html = page(results)
    tree = Tree(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in tree.tags}
    assert not {"src", "srcset", "data", "poster", "background"} & {name for _, attrs in tree.tags for name in attrs}
    assert not [name for _, attributes in tree.tags for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", html)
    for tag, attributes in tree.tags:
        target = attributes.get("href", "#")
        assert tag == "a" or target.startswith(("#", "data:image/png;base64,")), (tag, target)
        assert not target.startswith("javascript")


def test_ids_are_unique_and_every_inner_link_leads_somewhere(results):
    tree = Tree(page(results))
    ids = tree.values("id")
    assert len(ids) == len(set(ids)) > 60
    inner = [target[1:] for target in tree.values("href") if target.startswith("#")]
    assert inner and set(inner) <= set(ids)
    assert set(tree.values("aria-labelledby")) <= set(ids)


def test_headings_are_in_order_and_there_is_one_title(results):
    levels = [int(tag[1]) for tag, _ in Tree(page(results)).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_no_cell_is_empty_and_headers_have_a_scope(results):
    tree = Tree(page(results))
    assert len(tree.cells) > 200 and all(cell.strip() for cell in tree.cells)
    assert all(attributes.get("scope") for tag, attributes in tree.tags if tag == "th")
    tables = sum(tag == "table" for tag, _ in tree.tags)
    assert tables == sum(tag == "caption" for tag, _ in tree.tags) > 5
    # A table never widens the page: each has a box of its own, which the keyboard reaches.
    boxes = [attributes for _, attributes in tree.tags if attributes.get("class") == "scroll"]
    assert len(boxes) == tables and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_every_text_is_escaped(results):
    html = page(results)
    texts = "".join(Tree(html).texts)
    assert "<script" not in html and texts.count(EVIL) >= 8


def test_every_table_of_the_paper_is_there_or_says_why_not(results):
    html = section(page(results), "tables")
    for number in table_numbers():
        assert f'id="table-{number:02d}"' in html
    assert "Table 1: not run; results/test/tables/table_01.csv is missing: dvc repro table_01@test." in html
    assert "Table 10: not run; experiment test leaves it out; nothing runs in the place of RoBERTa-base" in html
    assert "Table 12: not run; experiment test has no stage table_12." in html


def test_a_table_has_ours_the_papers_and_the_logs_numbers(results):
    html = section(page(results), "tables")
    table = re.search(r'<table class="cells">.*?</table>', html, re.S)[0]
    bodies = re.findall(r"<tbody>(.*?)</tbody>", table, re.S)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line, re.S) for line in re.findall(r"<tr.*?</tr>", bodies[0], re.S)]
    plain = [[re.sub(r"<[^>]+>", "", cell) for cell in line] for line in cells]
    assert plain[0] == ["61.25 n/c[60.00, 62.50]", "not run", "1,234,567 n/c", "60.00 n/c"]
    assert plain[1] == ["59.0 ± 1.9", "86.2", "109 mln", "82.5"]
    assert plain[2] == ["no log", "86.18", "no log", "82.00"]
    assert bodies[1].count("<tr") == 2  # nothing logged of the second label: no line
    assert "not run: no finished run of tiny: " in html and "all rows (MRPC)" in html
    assert "not comparable: tiny is not bert" in html and "Tiny stands in." in html


def test_few_columns_stand_side_by_side(results):
    rows = [row("CoLA", "batch size", 16, paper="32", released=32), row("CoLA", "learning rate", 1e-4, paper="3e-5")]
    write_table(results / "tables", 13, rows, Context("test", "sound", "settings"))
    table = re.search(r'<table class="cells across">.*?</table>', page(results), re.S)[0]
    assert [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<th.*?</th>", table)] == [
        "row", "batch size", "learning rate", "ours", "paper", "logs", "ours", "paper", "CoLA",
    ]  # fmt: skip
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", table)]
    assert cells == ["16 n/c", "32", "32", "1.00e-04 n/c", "3e-5"]


def test_a_long_table_is_folded_away(results):
    rows = [row(f"method {place}", "CoLA", 1.5) for place in range(30)]
    write_table(results / "tables", 8, rows, Context("test", "sound", "memory"))
    assert "<summary>Show the 30 rows of Table 8</summary>" in page(results)


def test_the_rows_of_differences_stand_by_their_tables(results):
    html = page(results)
    assert html.count("<article>") >= len(discrepancies()) == 30
    bearing = re.search(r'<section aria-labelledby="table-09".*?</section>', html, re.S)[0]
    for one in discrepancies():
        assert (f'href="#{one["row"].lower()}"' in bearing) == ("9" in one["tables"].split()), one["row"]
    assert '<a href="#figure-02">Figure 2</a>' in html and '<a href="#figure-03">' not in html


def test_figures_are_inlined_in_the_order_asked_for(results):
    html = section(page(results), "plots")
    titles = re.findall(r'<h3 id="figure-([\w-]+)">', html)
    assert titles == ["02", "another"]
    assert html.count('<svg viewBox="0 0 288 216"') == 2 and "k &amp; &lt;entries&gt;" in html
    assert html.count("data:image/png;base64,") == 2 and "currentColor" in html and "#6b7280" not in html
    assert "Figures not run: figure_03 (stripes)." in html


def test_scores_are_drawn_as_dots_with_their_intervals(results):
    chart = re.search(r'<figure class="chart">.*?</figure>', page(results), re.S)[0]
    assert chart.count('class="ours"') == 2 and chart.count('class="interval"') == 2
    assert "CoLA, %: Regular FT 61.25, 95 % interval 60.00 to 62.50" in chart
    assert 'class="paper"' not in chart and "printed values stand in the table alone" in chart


def test_printed_values_are_drawn_where_the_papers_own_model_ran(results):
    rows = [row("LoRA", "CoLA", 60.0, ours_low=59.0, ours_high=61.0, paper="58.4", released=58.37, model="bert_base")]
    write_table(results / "tables", 9, rows, Context("test", "printed", "BERT"))
    chart = re.search(r'<figure class="chart">.*?</figure>', page(results), re.S)[0]
    assert chart.count('class="paper"') == 2 and "Diamonds: printed" in chart


def test_protocol_choices_have_values_sources_and_links(results):
    html = section(page(results), "protocol")
    line = re.search(r'<tr><th scope="row">orientation</th>.*?</tr>', html)[0]
    assert re.sub(r"<[^>]+>", "|", line).split("|")[2:] and ">hosvd<" in line and 'href="#d2"' in line
    assert "preliminary: steps" in html and "sound (used)" in html
    assert "As run, GLUE" in html and "tiny, cola: full" in html


def test_environment_and_cost_come_from_the_records(results):
    write_record(results, "cola-seed3.json", record("lora", 3, status="failed", error=f"out of memory {EVIL}"))
    html = page(results)
    environment, cost = section(html, "environment"), section(html, "cost")
    assert "a" * 12 in environment and "<b>yes</b>" in environment and "2.13.0" in environment
    assert "2 CPU threads" in environment and "100 train rows" in environment
    assert re.search(r"GLUE training: full</th><td>tiny</td><td>2</td><td>3.0 min</td><td>0.25</td>", cost)
    assert "<td>4.00</td><td>1.50</td>" in cost and "not counted" in cost
    assert "cola-seed3.json: failed (out of memory" in section(html, "missing")


def test_cost_of_the_hosvd_is_measured_or_calculated(results):
    assert "Cost of the HOSVD: not run." in page(results)
    entry = {"way": "streaming", "gradients": 30, "seconds": {"total": 1.25}, "peak_bytes": 2_000_000, "reason": None}
    other = {"way": "unfoldings", "gradients": 30, "reason": "over 1 GB", "calculated": {"seconds": 9.5, "bytes": 5e9}}
    case = {"name": "tiny", "shape": [256, 64], "entries": [entry, other]}
    content = record() | {"run": {"experiment": "test", "kind": "hosvd_cost"}, "cases": [case]}
    (results / "hosvd_cost.json").write_text(json.dumps(content))
    cost = section(page(results), "cost")
    assert "<td>streaming</td><td>30</td><td>1.25</td><td>2.00</td><td>measured</td>" in cost
    assert "<td>9.5</td><td>5,000.00</td><td>calculated: over 1 GB</td>" in cost
    assert "hosvd cost" in section(page(results), "environment")


def test_stale_records_do_not_count(results):
    stale = results / "runs" / "tiny" / "full" / "cola-seed9.json"
    stale.write_text(json.dumps(record(seed=9)))
    assert re.search(r"GLUE training: full</th><td>tiny</td><td>2</td>", page(results))


def test_what_was_not_run_is_said(results):
    html = section(page(results), "missing")
    for text in (
        "BERT itself: not run; tiny runs in its place",
        "RoBERTa-base: not run; no model of experiment test stands in its place.",
        "GLUE tasks not run: STSB, MNLI, QNLI, QQP, RTE, SST2",
        "Table 2: formulas",
        "Table 9: 2 of 8 cells not run",
        "Figure 'figure_03' (stripes): not run",
        "Statistics: not run; results/test/statistics.json is missing.",
        "GLUE training of LoRA, SparseGrad, MeProp: not run",
    ):
        assert text in html, text


def test_an_experiment_without_anything_still_has_a_page(tmp_path):
    folder = tmp_path / "test"
    folder.mkdir()
    html = page(folder)
    tree = Tree(html)
    assert all(cell.strip() for cell in tree.cells) and len(tree.values("id")) == len(set(tree.values("id")))
    assert "Answers side by side (Appendix E): not run" in html and "there is no record" in html
    with pytest.raises(ValueError, match="does not exist: run the experiment's stages first"):
        page(tmp_path / "none")


def test_the_same_inputs_give_the_same_bytes(results):
    assert page(results) == page(results)
    assert not re.search(r"20\d\d-\d\d-\d\dT", page(results))


def test_phone_dark_and_print(results):
    html = page(results)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html and "@media print" in html and "overflow-x: auto" in html


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda folder: (folder / "tables" / "table_09.md").unlink(),
            "table_09.md is not: run the stage table_09 again",
        ),
        (lambda folder: (folder / "tables" / "table_09.md").write_text("words\n"), "is not a table's page"),
        (lambda folder: (folder / "tables" / "table_09.csv").write_text("a,b\n1,2\n"), "are needed"),
        (lambda folder: (folder / "figures" / "another.svg").unlink(), "no another.svg"),
        (lambda folder: (folder / "statistics.json").write_text("{"), "statistics.json is damaged"),
    ],
)
def test_damaged_inputs_are_refused(change, text, results):
    change(results)
    with pytest.raises(ValueError, match=re.escape(text)):
        page(results)


def test_an_experiment_without_a_key_or_protocol_is_refused(results):
    with pytest.raises(ValueError, match="lacks scale"):
        page(results, experiment={key: value for key, value in EXPERIMENT.items() if key != "scale"})
    with pytest.raises(ValueError, match="protocol 'nope'"):
        page(results, experiment=EXPERIMENT | {"protocol": "nope"})
