"""The record of the statistics, its page and its figure: every method and task that ran is in all of them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from finetune.report.evidence.evidence import collect_evidence
from finetune.report.evidence.experiment import Experiment
from finetune.report.figures.scores_figure import draw_scores
from finetune.report.labels import Labels, read_labels
from finetune.report.page.findings import findings
from finetune.report.page.inputs import PageInputs
from finetune.report.statistics.families import Design
from finetune.report.statistics.statistics_page import to_markdown
from finetune.report.statistics.statistics_record import build_statistics, plain
from finetune.stats.intervals import Difference
from finetune.store import records

LABELS = read_labels("glue", Path(__file__).parents[3] / "conf")
PEERS = ("full", "lora", "meprop", "sparsegrad")
STANDS_FOR = {"bert_base": "minilm", "llama2_7b": "tiny"}
EXPERIMENT = Experiment(
    "test", "sound", STANDS_FOR, methods=tuple(LABELS.methods), tasks=tuple(LABELS.tasks), labels=LABELS
)


def run(method, task, seed, score, **changes):
    facts = LABELS.methods[method]
    names = {"kind": "train", "model": "minilm", "method": method, "task": task, "seed": seed} | changes
    record = {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "score": score,
        "metric": "accuracy",
        "run": {"experiment": "test", "protocol": "sound", "scale": "local", "config_hash": "0"} | names,
        "parameters": {"trainable": 20, "trainable_per_layer": 1.0, "total": 1000},
        "model": {"title": {"minilm": "MiniLM-L6", "tiny": "Tiny"}[names["model"]], "random_weights": False},
        "config": {"method": {"name": method} | ({"base": facts.base} if facts.base != method else {})},
    }
    return f"{names['model']}/{method}-{task}-{seed}.json", record


def content_of(found, dialogues=()):
    return build_statistics(
        collect_evidence(EXPERIMENT, records=[*found, *dialogues]), Design(LABELS, PEERS, samples=200)
    )


@pytest.fixture(scope="module")
def content():
    scores = {"full": 0.60, "lora": 0.61, "sparsegrad": 0.62, "truncated": 0.63, "frozen_mlp": 0.55}
    found = [
        run(method, task, seed, score + seed * step)
        for place, (method, score) in enumerate(scores.items())
        for task, step in (("cola", 0.01), ("rte", 0.002 * place))
        for seed in (1, 2, 3)
    ]
    losses = {"sparsegrad": (3.0, 0.01), "lora": (3.2, 0.02), "truncated": (3.1, 0.011)}
    chat = {"kind": "llama", "model": "tiny"}
    return content_of(
        found, [run(m, "oasst1", s, x + s * d, **chat) for m, (x, d) in losses.items() for s in (1, 2, 3)]
    )


def test_record_is_json_and_says_where_it_comes_from(content):
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    (own,) = content["runs"]
    assert own["stands_for"] == ["bert_base"] and len(own["records"]) == 30
    families = ["methods", "methods over frozen_mlp", "variants of sparsegrad"]
    assert [family["name"] for family in own["comparison"]["families"]] == families
    assert content["methods"]["truncated"] == "Truncated" and content["tasks"]["rte"] == "RTE"
    assert [entry["model"] for entry in content["logs"]] == ["roberta_large", "bert_base", "roberta_base"]
    printed = content["logs"][1]["printed"]
    assert {m: (row["printed"], round(row["logs"]["mean"], 2)) for m, row in printed.items()} == {
        "full": (82.5, 82.0),
        "lora": (81.6, 82.33),
        "sparsegrad": (82.6, 81.66),
    }
    assert content["average_counts"]["does not follow"] == 6 and sum(content["average_counts"].values()) == 28
    assert content["cell_counts"] == {"rounded": 45, "cut_off": 0, "other": 21, "rounded_alone": 20}


def test_values_that_json_has_not():
    assert plain({"a": (Difference(1.0, 1.0, 1.0, float("inf")), 2)}) == {
        "a": [{"value": 1.0, "low": 1.0, "high": 1.0, "df": None, "p": None}, 2]
    }


def rows_of(text, head):
    """Rows of the first table below a line, as lists of cells."""
    lines = text.partition(f"\n{head}\n")[2].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("|"))
    end = next(place for place, line in enumerate([*lines[start:], ""], start) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start:end]]


def test_hostile_labels_and_titles_stay_text(content):
    label = "a|b [y](http://z) <img src=x> `k` **c**\n\n# H"
    named = {part: dict.fromkeys(content[part], label) for part in ("methods", "tasks")}
    found = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(
            to_markdown(content | named | {"runs": [one | {"title": label, "model": label} for one in content["runs"]]})
        )
    )
    before = MarkdownIt("commonmark").enable("table").parse(to_markdown(content))
    assert [token.type for token in found] == [token.type for token in before]
    children = [child.type for token in found for child in token.children or ()]
    assert set(children) <= {"text", "text_special", "softbreak"}


def test_page_holds_the_record(content):
    text = to_markdown(content)
    assert to_markdown(json.loads(json.dumps(content))) == text
    assert not re.search(r"\bnan\b|None|inf\b|\n\n\n|[ \t]\n", text)
    head, rule, *rows = rows_of(text, "## Our runs: MiniLM-L6 (minilm)")
    assert head == ["", "AVG", "IQM", "seeds", "CoLA", "RTE"] and set(rule) == {"---"}
    assert {row[0]: row[3] for row in rows}.keys() == {"Regular FT", "LoRA", "SparseGrad", "Truncated", "Frozen MLP"}
    (_, _, row) = rows_of(text, "Differences, family: variants of SparseGrad")
    assert row[0] == "Truncated - SparseGrad" and len(row) == 10
    (_, _, row) = rows_of(text, "Differences of losses, family: methods")
    assert row[:3] == ["SparseGrad - LoRA", "-0.220 [-0.245, -0.195]", "3"] and row[5] == "SparseGrad is better"
    assert rows_of(text, "## The authors' released logs: BERT")[3][:3] == ["LoRA", "81.6", "81.60"]
    assert len(rows_of(text, "## Printed cells against the logs")) == 2 + 9
    answers = text.partition("\nAnswer\n")[2]
    assert re.findall(r"- (\S+ \S+): ([^(]*) \(", answers) == [
        ("BERT MRPC", "looks exchanged"),
        ("BERT RTE", "fits better exchanged, but not beyond chance"),
        ("RoBERTa-base STSB", "fits better exchanged, but not beyond chance"),
    ]


def test_a_fifth_method_and_a_ninth_task_are_in_record_page_and_figure(tmp_path):
    found = [run(method, "rte", seed, 0.5 + seed / 10) for method in ("full", "sparsegrad") for seed in (1, 2, 3)]
    evidence = collect_evidence(EXPERIMENT, records=found)
    known = evidence.runs["minilm", "full", "rte"]
    more = {("minilm", m, t): known for m in ("dora", "sparsegrad") for t in ("rte", "news")}
    labels = Labels(LABELS.methods, LABELS.tasks | {"news": "News"})
    design = Design(labels, ("full", "dora", "sparsegrad"), samples=200)
    content = build_statistics(replace(evidence, runs=evidence.runs | more), design)
    (family,) = content["runs"][0]["comparison"]["families"]
    pairs = {(pair["first"], pair["second"]): list(pair["tasks"]) for pair in family["pairs"]}
    assert pairs == {
        ("sparsegrad", "dora"): ["rte", "news"],
        ("sparsegrad", "full"): ["rte"],
        ("dora", "full"): ["rte"],
    }
    head, _, *rows = rows_of(to_markdown(content), "## Our runs: MiniLM-L6 (minilm)")
    assert head[-2:] == ["RTE", "News"] and {row[0] for row in rows} == {"Regular FT", "DoRA", "SparseGrad"}
    svg = draw_scores(content, tmp_path, ["statistics.json"], labels)[0].read_text()
    assert ">DoRA, AVG<" in svg and ">News<" in svg


def test_too_few_pairs_and_nothing_run_are_said():
    found = [run(method, "rte", seed, 0.5 + seed / 10) for method in ("full", "lora") for seed in (1, 2)]
    text = to_markdown(content_of(found))
    assert rows_of(text, "Differences, family: methods")[2][-1] == "not separated (too few pairs)"
    assert "dialogues" not in text and "\nNothing ran.\n" not in text
    assert "\nNothing ran.\n" in to_markdown(content_of([]))


def test_figure_is_drawn_from_the_record(content, tmp_path):
    svg, _, words = draw_scores(content, tmp_path, ["results/test/statistics.json"], LABELS)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())
    for text in ("MiniLM-L6, our runs", "BERT, authors' logs", "LoRA, AVG", "RTE", "Truncated", "Tiny, our runs"):
        assert any(text in found.replace("&#39;", "'") for found in texts), text
    assert records.read_json(words)["source"] == ["results/test/statistics.json"]
    draw_scores(content_of([]), tmp_path, ["statistics.json"], LABELS)


def test_the_findings_say_the_losses(content):
    inputs = PageInputs({"name": "test"}, LABELS, {}, (), {}, content, (), {}, False)
    card = next(one for one in findings(inputs) if "Variants of SparseGrad on Tiny" in one.title)
    assert card.title == "Variants of SparseGrad on Tiny: 1 of 1 pairs separated"
    assert "+0.102" in card.lines[0] and "SparseGrad is better" in card.lines[0]
