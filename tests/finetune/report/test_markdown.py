"""Texts in Markdown, LaTeX and HTML: nothing in them is taken for markup, and all of them is read."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from finetune.report import markdown
from finetune.report.model import Cell, Note, Table
from finetune.report.page.render import linked
from finetune.report.tables.render import to_text

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PAYLOADS = (
    *("<img src=x onerror=alert(1)>", "<!-- x -->", "&lt;b&gt;", "<https://a.example>", "</td></table>"),
    *("[a](javascript:alert(1))", "![a](https://a.example/i.png)", "[a]: https://a.example", "[a][b]", "a\n\n[b]: c"),
    *("a|b|c", "a\\|b", "--- | ---", "a\n| --- |\n| x |", "`code`", "``", "**b** _e_ __s__ ~~d~~", "*", "a_b_c"),
    *("# head", "1. item", "2)", "- item", "+", "> quote", "===", "---", "    code", "\tcode", "```\nx\n```", "$x$"),
    *("a\\", "\\", "\u2028- x", "\x00\x1b[31m", "  \n", "", "😀_x_", "www.a.example http://a.example"),
)
texts = st.lists(st.sampled_from([*PAYLOADS, *"\\`*_[]()<>&|#-+.!~$:=\"' \n1a"]), max_size=6).map("".join)


def read(inline):
    """What readers see of an inline token, which must be text and nothing else."""
    assert {child.type for child in inline.children} <= {"text", "text_special"}, inline.children
    return "".join(child.content for child in inline.children)


def seen(text):
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split())


@pytest.mark.parametrize("text", PAYLOADS)
def test_a_text_is_read_as_it_is(text):
    tokens = [token for token in READER.parse(markdown.escape(text)) if token.type == "inline"]
    assert " ".join(map(read, tokens)).split() == seen(text).split()


@given(texts)
def test_any_text_is_one_line_of_text_and_one_cell(text):
    kinds = [token.type for token in READER.parse(markdown.escape(text))]
    assert kinds in ([], ["paragraph_open", "inline", "paragraph_close"])
    tokens = READER.parse(f"{markdown.head(['a', text])}\n{markdown.row([markdown.escape(text), 'b'])}")
    cells = [read(token) for token in tokens if token.type == "inline"]
    assert [" ".join(cell.split()) for cell in cells] == ["a", seen(text), seen(text), "b"]


@given(texts)
def test_any_text_is_escaped_once(text):
    template = markdown.environment().from_string("{% macro m(x) %}{{ x }}{% endmacro %}- {{ m(x) }}{{ [x] | row }}")
    assert template.render(x=text) == f"- {markdown.escape(text)}{markdown.row([text])}"


@given(texts)
def test_any_text_on_a_page_is_its_text(text):
    shown = "".join(mark for mark in text if mark.isprintable())
    assert "".join(ElementTree.fromstring(f"<p>{linked(shown)}</p>").itertext()) == shown


HOSTILE = "M|x [y](http://z) <img src=x> `k` $\\input{p}$ \n\n# H"


def test_a_hostile_title_in_all_parts_of_a_table():
    cells = (
        Cell(HOSTILE, HOSTILE, "score", value=1.0, verdict="agrees"),
        Cell("b", HOSTILE, "score", verdict="not run"),
    )
    table = Table(1, "table_01", HOSTILE, "e", "p", cells, (HOSTILE,), (Note("warning", HOSTILE), Note("x", HOSTILE)))
    tokens = READER.parse(to_text("md", table))
    for token in tokens:
        if token.type == "inline":
            read(token)
    kinds = [token.type for token in tokens]
    assert kinds.count("heading_open") == kinds.count("table_open") == 1 and kinds.count("tr_open") == 3
    assert kinds.count("td_open") + kinds.count("th_open") == 2 * 3
    latex = to_text("tex", table)
    assert r"\input" not in latex and r"\$\textbackslash{}input\{p\}\$ \# H" in latex
    assert "\n\n" not in latex and latex.count(r"\\") == to_text("tex", replace(table, title="t")).count(r"\\")


@pytest.mark.parametrize("label", ["[5pt] x", "*x"])
def test_a_label_is_no_argument_of_a_line_break(label):
    table = Table(1, "table_01", "t", "e", "p", (Cell(label, "c", "score", verdict="not run"),))
    assert f"\n{{{label}}} & " in to_text("tex", table)
