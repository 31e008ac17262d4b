"""The record of the statistics, its page and its figure."""

import json
import re

import pytest

from finetune.report.evidence import evidence as evidences
from finetune.report.figures.scores_figure import draw_scores
from finetune.report.labels import Labels
from finetune.report.statistics.statistics_page import to_markdown
from finetune.report.statistics.statistics_record import build_statistics
from finetune.store import records


def run(method, task, seed, score, base=None):
    record = {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "score": score,
        "metric": "accuracy",
        "run": {"experiment": "test", "kind": "train", "protocol": "sound", "scale": "local", "config_hash": "0"}
        | {"model": "minilm", "method": method, "task": task, "seed": seed},
        "parameters": {"trainable": 5, "trainable_per_layer": 1.0},
        "model": {"title": "MiniLM-L6", "random_weights": False},
        "config": {"method": {"name": method} | ({"base": base} if base else {})},
    }
    return f"runs/{method}-{task}-{seed}.json", record


def content_of(found):
    evidence = evidences.collect_evidence(
        experiment="test", protocol="sound", stands_for={"bert_base": "minilm"}, records=found
    )
    return build_statistics(evidence, samples=500)


@pytest.fixture(scope="module")
def content():
    methods = {"full": 0.60, "lora": 0.61, "sparsegrad": 0.62, "truncated": 0.63}
    found = [
        run(method, task, seed, score + seed * step, "sparsegrad" if method == "truncated" else None)
        for place, (method, score) in enumerate(methods.items())
        for task, step in (("cola", 0.01), ("rte", 0.002 * place))
        for seed in (1, 2, 3)
    ]
    return content_of(found)


def test_record_is_json_and_says_where_it_comes_from(content):
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    (own,) = content["runs"]
    assert own["stands_for"] == ["bert_base"] and own["bases"] == {"truncated": "sparsegrad"}
    assert len(own["records"]) == 24 and [entry["model"] for entry in content["logs"]] == [
        "roberta_large",
        "bert_base",
        "roberta_base",
    ]
    printed = content["logs"][1]["printed"]
    assert {m: (row["printed"], round(row["logs"]["mean"], 2)) for m, row in printed.items()} == {
        "full": (82.5, 82.0),
        "lora": (81.6, 82.33),
        "sparsegrad": (82.6, 81.66),
    }


def test_page(content):
    text = to_markdown(content)
    assert to_markdown(json.loads(json.dumps(content))) == text
    lines = text.splitlines()
    for line in (
        "## Our runs: MiniLM-L6 (minilm)",
        "In the place of BERT; not the paper's model. Scale local, not the paper's.",
        "Differences, family: variants of sparsegrad",
        "Does not follow: 7 of 30.",
        "- Table 4, LoRA: printed 83.7; the printed cells' mean is 84.8625, between 84.8125 and 84.9125 before "
        "rounding.",
    ):
        assert line in lines, line
    assert "| LoRA | 81.6 | 81.60 | 82.33 [" in text and "| SparseGrad | 82.6 | 82.58 | 81.66 [" in text
    assert "| truncated - SparseGrad |" in text and "6 (without MNLI, QQP)" in text
    assert "- BERT MRPC: looks exchanged (distance 5.15 as printed, 0.45 exchanged" in text
    assert "- BERT RTE: fits better exchanged, but not beyond chance" in text
    assert "LoRA 81.60 -> 82.54 (logs 82.33); SparseGrad 82.58 -> 81.64 (logs 81.66)" in text
    assert "all 13 of 66" in text and not re.search(r"\bnan\b|None|inf\b", text)
    tables = [line for line in lines if line.startswith("| ")]
    assert all(line.endswith(" |") for line in tables)


def test_too_few_pairs_are_said_to_be():
    found = [run(method, "rte", seed, 0.5 + seed / 10) for method in ("full", "lora") for seed in (1, 2)]
    assert "not separated (too few pairs)" in to_markdown(content_of(found))


def test_a_control_is_what_trains_nothing_of_the_matrices_of_its_model():
    found = [run(m, "rte", seed, 0.5 + seed / 10) for m in ("full", "lora") for seed in (1, 2)]
    control = [run("frozen", "rte", seed, 0.6, "full") for seed in (1, 2)]
    other = [run("frozen", "rte", seed, 0.6, "full") for seed in (1, 2)]  # of another model it is a variant
    for _, record in control:
        record["parameters"]["trainable_per_layer"] = 0.0
    other = [(f"other/{path}", {**record, "run": {**record["run"], "model": "other"}}) for path, record in other]
    first, second = content_of(found + control + other)["runs"]
    assert [family["name"] for family in first["comparison"]["families"]] == ["methods", "methods over frozen"]
    assert "methods over frozen" not in [family["name"] for family in second["comparison"]["families"]]


def test_nothing_run(tmp_path):
    content = content_of([])
    text = to_markdown(content)
    assert "## Our runs\n\nNothing ran." in text and "## The authors' released logs: BERT" in text
    draw_scores(content, tmp_path, ["statistics.json"], Labels())
    assert "nothing ran" in json.loads((tmp_path / "methods_scores.json").read_text())["caption"]


def test_figure(content, tmp_path):
    paths = draw_scores(content, tmp_path / "a", ["results/test/statistics.json"], Labels())
    again = draw_scores(content, tmp_path / "b", ["results/test/statistics.json"], Labels())
    assert [path.name for path in paths] == [f"methods_scores.{suffix}" for suffix in ("svg", "png", "json")]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", paths[0].read_text())
    for text in ("MiniLM-L6, our runs", "BERT, authors' logs", "lora, AVG", "RTE", "truncated", "difference (points)"):
        assert any(text in found.replace("&#39;", "'") for found in texts), text
    words = records.read_json(paths[2])
    assert "3 seeds a task" in words["caption"] and words["source"] == ["results/test/statistics.json"]
    assert any("Arrows" in note for note in words["notes"])


def test_values_that_json_has_not():
    from finetune.report.statistics.statistics_record import plain
    from finetune.stats.intervals import Difference

    assert plain({"a": (Difference(1.0, 1.0, 1.0, float("inf")), 2)}) == {
        "a": [{"value": 1.0, "low": 1.0, "high": 1.0, "df": None}, 2]
    }
