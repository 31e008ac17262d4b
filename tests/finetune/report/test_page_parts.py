"""Parts of the report page: protocol files, differences, findings, pictures."""

from base64 import b64decode

import pytest

from finetune.published import discrepancies, table_numbers
from finetune.report.labels import Labels
from finetune.report.model import Cell, Note, Table
from finetune.report.page.findings import findings, pair_sentence
from finetune.report.page.inputs import Found, PageInputs
from finetune.report.page.protocol import Choice, read_choices
from finetune.report.page.render import linked, picture
from finetune.report.page.scores import statistics_blocks
from finetune.store.catalog import MethodFacts

NAMES = {"full": "Regular FT", "lora": "LoRA", "meprop": "MeProp", "sparsegrad": "SparseGrad", "dora": "DoRA"}
SIDES = ("first", "second")
LABELS = Labels({name: MethodFacts(name, label, name) for name, label in NAMES.items()})


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


def test_rows_in_a_text_become_links_and_the_rest_is_escaped():
    assert linked("D2 & D31 <b>") == '<a href="#d2">D2</a> &amp; D31 &lt;b&gt;'


def test_a_picture_follows_the_readers_scheme():
    body = b64decode(picture(b"<svg><text>a</text></svg>\n").removeprefix("data:image/svg+xml;base64,")).decode()
    assert body.startswith("<svg><text>a</text><style>") and body.endswith("</style></svg>")
    assert "prefers-color-scheme:dark" in body


def test_the_differences_are_whole():
    rows = discrepancies()
    assert [row["row"] for row in rows] == [f"D{number}" for number in range(1, 31)]
    for row in rows:
        assert all(row[name].strip() for name in ("topic", "paper", "code", "printed", "released", "sound")), row
        assert {int(number) for number in row["tables"].split()} <= set(table_numbers()), row
        assert set(row["figures"].split()) <= {"2", "3"}, row


# ---- findings ----


def pair(verdict="not separated", first="sparsegrad", second="lora", least=0.03, tasks=None):
    test = {"difference": {"value": 1.5, "low": -1.0, "high": 4.0}, "pairs": 6, "p": 0.125, "p_holm": 0.25}
    other = {"improvement": {"mean": 0.75, "low": 0.5, "high": 1.0}, "unpaired": 1, "tasks": tasks or {}}
    return {"first": first, "second": second, "mean": test | {"least": least, "verdict": verdict}} | other


def inputs(statistics=None, tables=(), found=()):
    built = {table.name: table for table in tables}
    return PageInputs({"name": "test"}, LABELS, built, (), {}, statistics, tuple(found), {}, False)


def statistics(pairs, kind="methods", of=""):
    mean = {"mean": 50.0, "low": 49.0, "high": 51.0, "n": 3}
    methods = {one[side]: {"tasks": {"cola": mean, "ninth": mean}, "mean": mean} for one in pairs for side in SIDES}
    none = {"name": "variants of lora", "kind": "variants of", "of": "lora", "pairs": []}
    families = [{"name": f"{kind} {of}".strip(), "kind": kind, "of": of, "pairs": pairs}, none]
    entry = {"title": "Tiny", "model": "tiny", "stands_for": ["bert_base"]}
    row = {"table": 9, "repeats": False, "missing": [], "twin": None, "verdict": "does not follow"}
    implied = {"implied": [91.1, 92.7], "missing": ["SST2"], "twin": "table 10, SparseGrad", "twin_value": "94.2"}
    averages = [
        row | {"row": "MeProp", "printed": "82.1", "mean": 81.47},
        row | {"row": "LoRA", "printed": "81.6", "verdict": "follows", "mean": 81.6},
        row | {"row": "LoRA again", "printed": "1", "mean": 2.0, "repeats": True},
        row | {"table": 12, "row": "100", "printed": "83.6", "mean": None} | implied,
    ]
    cell = {"model": "bert_base", "printed": [83.8, 86.6], "logged": [86.5, 84.2], "distance": 5.1}
    cell |= {"distance_exchanged": 0.5, "p_chance": 0.01, "p_holm": 0.5}
    answers = {"mrpc": "yes", "rte": "not beyond chance", "stsb": "no", "cola": "yes"}
    cells = [cell | {"task": task, "verdict": verdict} for task, verdict in answers.items()]
    asked = {"model": "bert_base", "methods": ["lora", "sparsegrad"], "tasks": ["mrpc", "rte", "stsb"]}
    return {
        "runs": [entry | {"comparison": {"methods": methods, "families": families}}],
        "decoders": [],
        "logs": [],
        "averages": averages,
        "exchange": {"asked": asked, "cells": cells},
    }


@pytest.mark.parametrize(
    ("verdict", "least", "words"),
    [
        ("not separated", 0.03, "not separated (p 0.25, 6 pairs)"),
        ("first is better", 0.03, "SparseGrad is better (p 0.25, 6 pairs)"),
        ("second is better", 0.03, "LoRA is better (p 0.25, 6 pairs)"),
        ("not separated", 0.25, "not separated (p 0.25, 6 pairs, so few pairs separate nothing)"),
    ],
)
def test_a_sentence_claims_what_its_test_says(verdict, least, words):
    said = pair_sentence(pair(verdict, least=least), LABELS)
    assert said == f"SparseGrad − LoRA: +1.50 [-1.00, +4.00] points, {words}."


def test_findings_of_the_statistics():
    task = {"difference": {"value": -2.0, "low": -3.0, "high": -1.0}, "pairs": 5, "p_holm": 0.01}
    single = {"ninth": task | {"verdict": "second is better"}, "mrpc": task | {"verdict": "not separated"}}
    apart = pair("first is better", "dora", "full", tasks=single)
    own, averages, exchange = findings(
        inputs(statistics([pair(tasks=single), apart, pair(first="lora", second="dora")]))
    )
    assert own.title == "Methods on Tiny: 1 of 3 pairs separated"
    assert [line.partition(":")[0] for line in own.lines] == [
        "SparseGrad − LoRA",
        "DoRA − Regular FT",
        "On ninth alone, SparseGrad − LoRA",
        "On ninth alone, DoRA − Regular FT",
    ]
    assert "Mean over MRPC, ninth, 5 paired seeds a task" in own.after and "in the place of BERT" in own.after
    assert averages.title == "2 of 3 printed averages do not follow from their rows"
    assert averages.lines[0] == "Table 9, MeProp: printed 82.1, its cells give 81.47."
    assert "SST2, not printed here, would be 91.1 to 92.7; table 10, SparseGrad" in averages.lines[1]
    assert exchange.title.endswith("exchanged? MRPC yes; RTE not beyond chance; STSB no") and len(exchange.lines) == 3


def test_nothing_separated_is_said_so():
    (own, *_) = findings(inputs(statistics([pair(tasks={"cola": pair()["mean"]})], "variants of", "sparsegrad")))
    assert own.title == "Variants of SparseGrad on Tiny: no pair separated"


def test_the_statistics_are_shown_from_their_fields():
    task = {"difference": {"value": -2.0, "low": -3.0, "high": -1.0}, "pairs": 5, "p_holm": 0.01, "verdict": "x"}
    content = statistics([pair("second is better", tasks={"cola": task, "ninth": task})])
    blocks = list(statistics_blocks(content, LABELS))
    assert [block.id for block in blocks if block.block == "heading"] == ["statistics-runs-1"]
    rows = {
        block.caption: [[text.replace("\N{NO-BREAK SPACE}", " ") for text in line] for line in block.rows]
        for block in blocks
        if block.block == "grid"
    }
    assert rows["Means, in percent"][0] == ["SparseGrad", *["50.00 [49.00, 51.00]"] * 3, "3"]
    assert rows["Differences, points: methods"] == [
        ["SparseGrad − LoRA", "LoRA is better", "+1.50 [-1.00, +4.00]", "0.75 [0.50, 1.00]",
         "6, 1 runs without partner", "0.12", "0.25", "0.03"]
    ]  # fmt: skip
    single = "-2.00 [-3.00, -1.00], p 0.01"
    assert rows["Single tasks, p by Holm: methods"] == [["SparseGrad − LoRA", single, single]]


LOSS = {"quantity": "loss", "model": "tiny", "n": 3}


@pytest.mark.parametrize(
    ("high", "title"), [(3.5, "full has the lowest"), (3.9, "no lowest validation loss stands apart")]
)
def test_a_lowest_loss_needs_an_interval_of_its_own(high, title):
    cells = (
        Cell("lora", "Valid Loss", value=3.7, low=3.6, high=3.8, **LOSS),
        Cell("full", "Valid Loss", value=3.4, low=3.3, high=high, **LOSS),
        Cell("full", "#Train params", "trained_share", value=16.9, model="tiny"),
        Cell("full, another", "Valid Loss", value=1.0, low=0.9, high=1.1, **LOSS | {"model": "another"}),
    )
    (found,) = findings(inputs(tables=[Table(6, "table_06", "t", "test", "sound", cells)]))
    assert title in found.title and found.lines[0] == f"full: 3.4000 [3.3000, {high:.4f}] nats a token, trains 16.90%."


def test_speed_is_read_from_ratios_and_warnings_go_with_it():
    given = {"flags": ("over_full",), "model": "tiny"}
    cells = (
        *(Cell(label, "Steps/Sec.", "speed", method=name, value=1.0) for name, label in NAMES.items()),
        Cell("a", "Steps/Sec.", "speed", method="sparsegrad", value=1.02, low=0.97, high=1.05, **given),
        Cell("b", "Steps/Sec.", "speed", method="lora", value=1.1, low=1.05, high=1.15, **given),
        Cell("b", "Peak", "training", method="lora", value=0.9, **given),
        Cell("b", "CoLA", "speed", method="meprop", task="cola", value=9.0, low=8.0, high=9.0, **given),
    )
    table = Table(3, "table_03", "t", "test", "sound", cells, notes=(Note("warning", "load average 3."),))
    (found,) = findings(inputs(tables=[table]))
    assert found.title == "Faster than full fine-tuning a step: LoRA"
    assert found.lines == [
        "LoRA: speed × 1.10 [1.05, 1.15], peak in training × 0.90.",
        "SparseGrad: speed × 1.02 [0.97, 1.05].",
    ]
    assert found.after.endswith("Warning: load average 3.")


def test_findings_of_a_stale_basis_are_means_over_layers():
    def look(step, **blocks):
        return {"step": step, "spaces": {space: [{"block": v} for v in values] for space, values in blocks.items()}}

    def record(task, end):
        steps = [look(0, initial=[0.3, 0.5], stored=[0.1, 0.3]), look(9, initial=[9, 9]), end]
        titles = {"task": task, "model": "a BERT"}
        return Found("x.json", {"titles": titles, "run": {"kind": "energy", "trajectory": "full"}, "steps": steps})

    rte = record("RTE", look(50, initial=[0.2, 0.2], refreshed=[0.3, 0.5]))
    qnli = record("QNLI", look(50, initial=[0.1, 0.1], refreshed=[0.4, 0.6]))
    (found,) = findings(inputs(found=[rte, qnli]))
    assert found.title == "How a basis ages on a BERT: 25 to 50 % of its block’s energy is left at the last look"
    assert found.lines[0] == (
        "RTE, full fine-tuning: 0.40 at step 0, 0.20 at step 50, 0.40 if renewed there; "
        "a basis made under another head starts at 0.20."
    )
    assert "0.10 at step 50, 0.50 if renewed" in found.lines[1]
