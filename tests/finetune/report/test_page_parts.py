"""Parts of the report page: markup, drawings put into a page, protocol files, Markdown, axes, and findings."""

import re

import pytest

from finetune.published import discrepancies, table_numbers
from finetune.report.page.markup import Html, grid, items, join, tag
from finetune.report.page.page_charts import ticks
from finetune.report.page.page_figures import inline_svg
from finetune.report.page.page_findings import findings, pair_sentence
from finetune.report.page.page_inputs import PageInputs
from finetune.report.page.page_markdown import headings, markdown_html
from finetune.report.page.page_protocol import Choice, linked, read_choices
from finetune.report.page.page_records import Found
from finetune.report.page.page_tables import BuiltTable

SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def svg(body, width="144pt"):
    return f'<svg {SPACES} width="{width}" height="72pt">{body}</svg>'


# ---- markup ----


def test_texts_are_escaped_and_markup_is_not():
    assert tag("p", "a < b & c", tag("b", ">")) == "<p>a &lt; b &amp; c<b>&gt;</b></p>"
    assert (
        tag("a", "x", href='"&', class_="y", aria_label=None, hidden=True)
        == '<a href="&quot;&amp;" class="y" hidden>x</a>'
    )
    assert tag("hr") == "<hr>" and join(["<", Html("<i>")], ", ") == "&lt;, <i>"
    assert items(["<"]) == "<ul>\n<li>&lt;</li>\n</ul>"


def test_a_grid_has_scopes_a_caption_and_a_box():
    html = grid(["what", "n"], [["<a>", "1"]], "Caption")
    assert '<th scope="row">&lt;a&gt;</th><td>1</td>' in html and '<th scope="col">what</th>' in html
    assert html.startswith('<div class="scroll" role="region" aria-label="Caption" tabindex="0">')


# ---- drawings ----


def test_ids_references_and_rules_become_the_figures_own():
    body = (
        '<defs><style>*{stroke-linejoin: round} .a, text{fill: red}</style><path id="m1" d="M0 0"/></defs>'
        '<metadata/><g clip-path="url(#c1)"><use xlink:href="#m1" style="fill: #6b7280; clip-path: url(#c1)"/></g>'
        '<clipPath id="c1"><rect/></clipPath><text>a &lt; b</text>'
    )
    html = inline_svg('<?xml version="1.0"?>' + svg(body), "fig", "A & B")
    assert set(re.findall(r' id="([^"]+)"', html)) == {"fig", "fig-m1", "fig-c1"}
    assert '<use href="#fig-m1" style="fill: currentColor; clip-path: url(#fig-c1)"' in html
    assert 'clip-path="url(#fig-c1)"' in html
    assert "#fig * {stroke-linejoin: round}" in html and "#fig .a, #fig text {fill: red}" in html
    assert 'viewBox="0 0 144 72"' in html and 'aria-label="A &amp; B"' in html and "--natural: 144pt" in html
    assert "xmlns" not in html and "metadata" not in html and " width=" not in html and "a &lt; b" in html


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<script>1</script>", "'script' element"),
        ('<image xlink:href="https://example.org/a.png"/>', "a page loads nothing"),
        ('<image xlink:href="data:image/svg+xml;base64,AA"/>', "a page loads nothing"),
        ('<g onclick="1"/>', "attribute 'onclick'"),
        ('<g style="fill: url(https://example.org)"/>', "a page loads nothing"),
        ("<style>@import 'a.css';</style>", "plain rules are taken only"),
        ("<style>*{fill: url(a)}</style>", "plain rules are taken only"),
        ("<g>", "no SVG"),
    ],
)
def test_a_drawing_that_loads_or_runs_is_refused(body, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        inline_svg(svg(body), "fig", "x")


def test_a_drawing_without_a_size_or_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="points are needed"):
        inline_svg(svg("", width="50%"), "fig", "x")
    with pytest.raises(ValueError, match="outermost element is html"):
        inline_svg("<html/>", "fig", "x")


# ---- protocol ----


def test_choices_of_a_protocol_carry_their_sources():
    one = {"name": "x", "density": 0.01, "preliminary": {"steps": 30, "update": False}, "search": {"rate": [1e-6, 0.1]}}
    sources = {"density": "D1: one", "preliminary": {"steps": "D3"}}
    protocols = {"x": one | {"sources": sources}, "y": one | {"sources": {"like": "x", "search": "here"}}}
    assert read_choices("x", protocols) == [
        Choice("density", "0.01", "D1: one"),
        Choice("preliminary.steps", "30", "D3"),
        Choice("preliminary.update", "no", ""),
        Choice("search", "rate 1e-06, 0.1", ""),
    ]
    assert [choice.source for choice in read_choices("y", protocols)] == ["D1: one", "D3", "", "here"]
    with pytest.raises(ValueError, match="protocol 'z'; there are x, y"):
        read_choices("z", protocols)


def test_rows_in_a_text_become_links():
    assert linked("D2 & D31") == '<a href="#d2">D2</a> &amp; D31'


def test_the_differences_are_whole():
    rows = discrepancies()
    assert [row["row"] for row in rows] == [f"D{number}" for number in range(1, 31)]
    for row in rows:
        assert all(row[name].strip() for name in ("topic", "paper", "code", "printed", "released", "sound")), row
        assert {int(number) for number in row["tables"].split()} <= set(table_numbers()), row
        assert set(row["figures"].split()) <= {"2", "3"}, row


# ---- Markdown and axes ----


def test_markdown_of_the_writers():
    text = "# Title\n\nWords & more.\n\n## One\n\n| | a |\n| --- | --- |\n| x \\| y | |\n\n- p\n- q\n\n## Two\n"
    html = markdown_html(text, "s")
    assert headings(text, "s") == [("s-1", "One"), ("s-2", "Two")]
    assert '<h3 id="s-1">One</h3>' in html and '<h3 id="s-2">Two</h3>' in html and "Title" not in html
    assert '<th scope="row">x | y</th><td>none</td>' in html and "<li>p</li>\n<li>q</li>" in html
    assert "<p>Words &amp; more.</p>" in html and 'class="hidden">row</span>' in html


@pytest.mark.parametrize(("low", "high", "expected"), [(0, 10, [0, 5, 10]), (3.37, 3.77, [3.4, 3.5, 3.6, 3.7])])
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("span", [1e-9, 0.013, 1.0, 7.7, 12345.0])
def test_there_are_a_few_ticks_at_any_size(span):
    found = ticks(-0.3 * span, 0.7 * span)
    assert 2 <= len(found) <= 5 and -0.3 * span <= found[0] and found[-1] <= 0.7 * span * (1 + 1e-12)


def test_an_empty_axis_is_refused():
    with pytest.raises(ValueError, match="upper end must be above"):
        ticks(1.0, 1.0)


# ---- findings ----


def pair(verdict="not separated", first="sparsegrad", second="lora", least=0.03, tasks=None):
    test = {"difference": {"value": 1.5, "low": -1.0, "high": 4.0}, "pairs": 6, "p_holm": 0.25, "least": least}
    return {"first": first, "second": second, "mean": test | {"verdict": verdict}, "tasks": tasks or {}}


def test_a_sentence_claims_what_its_test_says():
    expected = "SparseGrad − LoRA: +1.50 [-1.00, +4.00] points, not separated (p 0.25, 6 pairs)."
    assert pair_sentence(pair()) == expected
    assert "SparseGrad is better (" in pair_sentence(pair("first is better"))
    assert "LoRA is better (" in pair_sentence(pair("second is better"))
    assert "so few pairs separate nothing" in pair_sentence(pair(least=0.25))


def inputs(statistics=None, tables=None, found=()):
    return PageInputs({"name": "test"}, tables or {}, (), {}, statistics, None, tuple(found), {}, False)


def statistics(pairs, name="methods"):
    entry = {"title": "Tiny", "model": "tiny", "stands_for": ["bert_base"]}
    comparison = {"families": [{"name": name, "pairs": pairs}, {"name": "empty", "pairs": []}]}
    averages = [
        {"table": 9, "row": "MeProp", "printed": "82.1", "verdict": "does not follow", "mean": 81.47},
        {"table": 9, "row": "LoRA", "printed": "81.6", "verdict": "follows", "mean": 81.6},
        {"table": 12, "row": "100", "printed": "83.6", "verdict": "does not follow", "mean": None}
        | {"implied": [91.1, 92.7], "missing": ["SST2"], "twin": "table 10, SparseGrad", "twin_value": "94.2"},
    ]
    cell = {"model": "bert_base", "printed": [83.8, 86.6], "logged": [86.5, 84.2], "distance": 5.1}
    cell |= {"distance_exchanged": 0.5, "p_chance": 0.01}
    cells = [
        cell | {"task": "mrpc", "evidence": 8.0, "p_holm": 0.001},
        cell | {"task": "rte", "evidence": 2.0, "p_holm": 0.5},
        cell | {"task": "cola", "evidence": 9.0, "p_holm": 0.001},
    ]
    asked = {"model": "bert_base", "methods": ["lora", "sparsegrad"], "tasks": ["mrpc", "rte"]}
    return {
        "runs": [entry | {"comparison": comparison}],
        "logs": [],
        "averages": averages,
        "exchange": {"asked": asked, "cells": cells},
    }


def test_findings_of_the_statistics():
    task = {"difference": {"value": -2.0, "low": -3.0, "high": -1.0}, "pairs": 5, "p_holm": 0.01}
    single = {"cola": task | {"verdict": "second is better"}, "mrpc": task | {"verdict": "not separated"}}
    pairs = [pair(tasks=single), pair("first is better", "lora", "full", tasks=single), pair("x", "lora", "meprop")]
    pairs[2]["mean"]["verdict"] = "not separated"
    own, averages, exchange = findings(inputs(statistics(pairs)))
    assert own.title == "Methods on Tiny: 1 of 3 pairs separated"
    assert [line.partition(":")[0] for line in own.lines] == [
        "SparseGrad − LoRA",
        "LoRA − Regular FT",
        "On CoLA alone, SparseGrad − LoRA",
        "On CoLA alone, LoRA − Regular FT",
    ]
    assert "Mean over CoLA, MRPC, 5 paired seeds a task" in own.after and "in the place of BERT" in own.after
    assert averages.title == "2 of 3 printed averages do not follow from their rows"
    assert averages.lines == (
        "Table 9, MeProp: printed 82.1, its cells give 81.47.",
        "Table 12, 100: printed 83.6, so SST2, not printed here, would be 91.1 to 92.7; table 10, SparseGrad, the same "
        "row, prints 94.2.",
    )
    assert exchange.title.endswith("exchanged? MRPC yes; RTE not beyond chance") and len(exchange.lines) == 2


def test_nothing_separated_is_said_so():
    (own, *_) = findings(inputs(statistics([pair(tasks={"cola": pair()["mean"]})], "variants of sparsegrad")))
    assert own.title == "Variants of sparsegrad on Tiny: no pair separated"


def built(number, rows, notes=()):
    blank = {"ours_low": None, "ours_high": None, "verdict": "not comparable", "model": "tiny", "n": "3"}
    return {number: BuiltTable(number, "t", (), tuple(notes), tuple(blank | row for row in rows))}


@pytest.mark.parametrize(
    ("high", "title"), [(3.5, "full has the lowest"), (3.9, "no lowest validation loss stands apart")]
)
def test_a_lowest_loss_needs_an_interval_of_its_own(high, title):
    rows = [
        {"row": "full", "column": "Valid Loss", "ours": 3.4, "ours_low": 3.3, "ours_high": high},
        {"row": "lora", "column": "Valid Loss", "ours": 3.7, "ours_low": 3.6, "ours_high": 3.8},
        {"row": "full", "column": "#Train params", "ours": 16.9},
    ]
    (found,) = findings(inputs(tables=built(6, rows)))
    assert title in found.title and found.lines[0].endswith("nats a token, trains 16.90%.")


def test_speed_is_read_from_ratios_and_warnings_go_with_it():
    rows = [
        {"row": f"{name} / Regular FT", "column": column, "ours": ours, "ours_low": low, "ours_high": ours + 0.05}
        for name, column, ours, low in (
            ("LoRA", "Steps/Sec.", 1.1, 1.05),
            ("SparseGrad", "Steps/Sec.", 1.02, 0.97),
            ("LoRA", "Peak in training, MB", 0.9, None),
        )
    ]
    (found,) = findings(inputs(tables=built(3, rows, ["Warning: load average 3."])))
    assert found.title == "Faster than full fine-tuning a step: LoRA"
    assert found.lines[0].endswith("peak in training × 0.90.") and "Warning: load average 3." in found.after


def test_findings_of_a_stale_basis_are_means_over_layers():
    def look(step, **blocks):
        return {"step": step, "spaces": {space: [{"block": v} for v in values] for space, values in blocks.items()}}

    def record(task, end):
        steps = [look(0, initial=[0.3, 0.5], stored=[0.1, 0.3]), look(9, initial=[9, 9]), end]
        titles = {"task": task, "model": "a BERT"}
        return Found("x.json", {"titles": titles, "run": {"kind": "energy", "trajectory": "full"}, "steps": steps})

    records = [
        record("RTE", look(50, initial=[0.2, 0.2], refreshed=[0.3, 0.5])),
        record("QNLI", look(50, initial=[0.1, 0.1], refreshed=[0.4, 0.6])),
    ]
    (found,) = findings(inputs(found=records))
    assert found.title == "How a basis ages on a BERT: 25 to 50 % of its block’s energy is left at the last look"
    assert found.lines[0] == (
        "RTE, full fine-tuning: 0.40 at step 0, 0.20 at step 50, 0.40 if renewed there; "
        "a basis made under another head starts at 0.20."
    )
    assert "0.10 at step 50, 0.50 if renewed" in found.lines[1] and "mean over a BERT's layers" in found.after
