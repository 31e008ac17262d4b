"""Validation losses of a decoder's methods and variants, compared at equal seeds."""

import pytest
from scipy import stats

from finetune.report.evidence.evidence import collect_evidence
from finetune.report.evidence.llama_evidence import collect_llama_evidence
from finetune.report.figures.scores_figure import draw_scores
from finetune.report.labels import Labels
from finetune.report.page.page_findings import findings
from finetune.report.page.page_inputs import PageInputs
from finetune.report.statistics.decoder_comparison import compare_losses
from finetune.report.statistics.statistics_page import to_markdown
from finetune.report.statistics.statistics_record import build_statistics, plain

LABELS = Labels()
WHAT = {"experiment": "test", "protocol": "sound", "stands_for": {"llama2_7b": "tiny"}}


def record(method, seed, loss, base=None):
    run = {"experiment": "test", "kind": "llama", "model": "tiny", "method": method, "task": "oasst1", "seed": seed}
    return f"runs/{method}-{seed}.json", {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "score": loss,
        "metric": "loss",
        "run": run | {"protocol": "sound", "scale": "smoke", "config_hash": "0"},
        "config": {"method": {"name": method} | ({"base": base} if base else {})},
        "parameters": {"trainable": 20, "total": 1000},
        "model": {"title": "Tiny", "random_weights": False},
    }


@pytest.fixture
def evidence():
    records = [record("sparsegrad", seed, 3.0 + 0.01 * seed) for seed in (1, 2, 3)]
    records += [record("lora", seed, 3.2 + 0.02 * seed) for seed in (1, 2, 3)]
    records += [record("truncated", seed, 3.1 + 0.011 * seed, "sparsegrad") for seed in (2, 3, 4)]
    return collect_llama_evidence(**WHAT, records=records)


def test_pairs_are_differences_at_equal_seeds(evidence):
    found = compare_losses(evidence)
    assert list(found.methods) == ["sparsegrad", "truncated", "lora"]
    assert found.methods["lora"].loss.mean == pytest.approx(3.24) and found.methods["lora"].share == 2.0
    methods, variants = found.families
    (pair,) = methods.pairs
    assert (pair.first, pair.second, pair.seeds) == ("sparsegrad", "lora", (1, 2, 3))
    differences = [-0.21, -0.22, -0.23]
    expected = stats.ttest_1samp(differences, 0)
    low, high = expected.confidence_interval()
    assert (pair.difference.value, pair.difference.low, pair.difference.high) == pytest.approx((-0.22, low, high))
    assert pair.p == pair.p_holm == pytest.approx(expected.pvalue) and pair.verdict == "first is better"
    (pair,) = variants.pairs
    assert variants.name == "variants of sparsegrad" and pair.seeds == (2, 3)
    assert pair.difference.value == pytest.approx(0.1025) and pair.verdict == "second is better"


def test_one_seed_has_no_test_and_noise_separates_nothing():
    one = collect_llama_evidence(**WHAT, records=[record("full", 1, 3.0), record("lora", 1, 4.0)])
    (pair,) = compare_losses(one).families[0].pairs
    assert (pair.p, pair.p_holm, pair.verdict, pair.difference.low) == (None, None, "not separated", None)
    noise = [record(method, seed, 3 + shift[seed]) for method, shift in
             {"full": [0, 0.1, 0.3], "lora": [0.1, 0.3, 0.0]}.items() for seed in range(3)]  # fmt: skip
    (pair,) = compare_losses(collect_llama_evidence(**WHAT, records=noise)).families[0].pairs
    assert pair.p > 0.05 and pair.verdict == "not separated"
    assert compare_losses(collect_llama_evidence(**WHAT)) is None


def test_the_page_the_figure_and_the_findings_say_it(evidence, tmp_path):
    content = build_statistics(collect_evidence(**WHAT), evidence, samples=50)
    assert content["decoder"] == plain(compare_losses(evidence))
    page = to_markdown(content)
    assert "## Our runs on dialogues: Tiny (tiny)" in page and "| LoRA | 3.240 [3.190, 3.290] | 3 | 2.000 % |" in page
    assert "| SparseGrad - LoRA | -0.220 [-0.245, -0.195] | 3 |" in page
    inputs = PageInputs({"name": "test"}, {}, (), {}, content, page, (), {}, False)
    card = next(one for one in findings(inputs) if one.title.startswith("Decoder"))
    assert card.title == "Decoder, variants of sparsegrad: 1 of 1 pairs separated"
    assert card.lines[0].startswith("truncated − SparseGrad: +0.103") and "SparseGrad is better" in card.lines[0]
    svg, _, words = draw_scores(content, tmp_path, ["statistics.json"], LABELS)
    for text in ("Tiny, our runs", "difference of losses (nats)", "... minus sparsegrad"):
        assert text in svg.read_text(), text
    assert "left of 0 the first method is lower" in words.read_text()
    without = build_statistics(collect_evidence(**WHAT), samples=50)
    assert "dialogues" not in to_markdown(without)
    assert "Validation losses" not in draw_scores(without, tmp_path, ["statistics.json"], LABELS)[2].read_text()
