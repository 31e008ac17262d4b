"""Table 6 from decoders' records and judgments: values, shares, verdicts, what is missing, what is mixed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from finetune.mt_bench.judged import Judged, read_judgments
from finetune.report.evidence.evidence import collect_evidence
from finetune.report.evidence.experiment import Experiment
from finetune.report.labels import Labels
from finetune.report.paper.shares import trainable_shares
from finetune.report.tables.tables import build_table
from finetune.store.catalog import MethodFacts

CONF = Path(__file__).parents[3] / "conf" / "model" / "llama2_7b.yaml"
FULL = yaml.safe_load(CONF.read_text(encoding="utf-8"))
SHARE, LOSS, SCORE = "#Train params", "Valid Loss", "I-Bench Score"
FACTS = {"dora": MethodFacts("dora", "DoRA", "peft"), "truncated": MethodFacts("truncated", "Truncated", "sparsegrad")}
EXPERIMENT = Experiment(
    "test",
    "printed",
    {"llama2_7b": "tiny"},
    methods=("full", "lora", "meprop", "sparsegrad"),
    ablations={"tiny": ("truncated",), "other": ("truncated",)},
    labels=Labels(FACTS | {name: MethodFacts(name, name.upper(), name) for name in ("full", "lora")}),
)
OWN = {"stands_for": {"llama2_7b": "llama2_7b"}}


def names(kind, model, method, seed, changes):
    found = {"experiment": "test", "kind": kind, "model": model, "method": method, "task": "oasst1", "seed": seed}
    found |= {"protocol": "printed", "scale": "paper", "config_hash": "abc"}
    return found | {name: value for name, value in changes.items() if name in found}


def trained(method, seed, loss, *, model="tiny", share=0.25, weights=False, **changes):
    record = {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "score": loss,
        "metric": "loss",
        "run": names("llama", model, method, seed, changes),
        "parameters": {"trainable": round(1_000_000 * share), "total": 1_000_000},
        "model": {"title": f"Title of {model}", "random_weights": weights},
    }
    record |= {name: value for name, value in changes.items() if name in record}
    return f"runs/{model}-{method}-{seed}.json", record


def judged(method, seed, by_repeat, *, model="tiny", judge=None, questions=None, answers=None, **changes):
    """Judgments whose scores are given by repeat: repeat -> {(question, turn): score}."""
    settings = {"model": "gpt-4", "measures_quality": True, "temperature": 0, "max_tokens": 2048}
    record = {
        "run": names("judgments", model, method, seed, changes),
        "judge": settings | {"repeats": len(by_repeat)} | (judge or {}),
        "questions": {"file": "mt_bench_inf.jsonl", "sha256": "f" * 64, "count": 20} | (questions or {}),
        "answers": {"cut": 0, "refused": 0} | (answers or {}),
    }
    facts = {"model": f"{model}-{method}-seed{seed}", "judge": [record["judge"]["model"], "single-v1"]}
    lines = [
        {"question_id": question, "turn": turn, "score": score, "judgment": f"[[{score}]]", "repeat": repeat} | facts
        for repeat, scores in enumerate(by_repeat)
        for (question, turn), score in scores.items()
    ]
    return Judged(f"judgments/{model}-{method}-{seed}.json", record, tuple(lines), (), 0)


def flat(score, questions=20):
    """Every item of the questions with about the same score: it varies by +-1 over questions, and not over turns."""
    return {(81 + q, turn): score + (-1) ** q for q in range(questions) for turn in (1, 2)}


def built(records=(), judgments=(), *, full=False, categories=None, agreements=(), **changes):
    models = {"llama2_7b": FULL} if full else {}
    experiment = replace(EXPERIMENT, **changes)
    found = {"records": records, "judgments": judgments, "agreements": agreements}
    evidence = collect_evidence(experiment, **found, models=models)
    return build_table(6, evidence, categories=categories)


def kinds(cell):
    return {reason.kind for reason in cell.reasons}


def notes(table, kind):
    return [note.text for note in table.notes if note.kind == kind]


# Shares of LLaMa-2-7B


def test_trainable_shares_by_hand():
    shares = trainable_shares(FULL)
    assert shares.total == 6_738_415_616 and shares.matrix == 11008 * 4096
    blocks = {"up+down of 11 blocks": 22, "gate+up+down of 11 blocks": 33, "up+down of 32 blocks": 64}
    assert [variant.name for variant in shares.variants] == [*blocks]
    for variant, matrices in zip(shares.variants, blocks.values(), strict=True):
        found = variant.shares
        assert found["full"] == pytest.approx(100 * matrices * 45_088_768 / 6_738_415_616)
        assert found["lora"] == pytest.approx(100 * matrices * 32 * (11008 + 4096) / 6_738_415_616)
        assert found["sparsegrad"] == found["meprop"] == pytest.approx(100 * matrices * 1e5 / 6_738_415_616)
    assert shares.gate == pytest.approx(100 * 11 * 45_088_768 / 6_738_415_616)


def test_shares_follow_the_configuration():
    small = FULL["architecture"] | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100}
    model = {"architecture": small, "layers_to_transform": [0, 3], "lora_rank": 2, "k": 50}
    found = trainable_shares(model)
    assert found.variants[0].name == "up+down of 2 blocks"
    assert found.variants[0].shares["lora"] == pytest.approx(100 * 4 * 2 * (64 + 96) / found.total)
    assert trainable_shares(model | {"layers_to_transform": None}).variants[0].name == "up+down of 4 blocks"
    with pytest.raises(ValueError, match=r"layers_to_transform has \[4\]; the model's blocks are 0 to 3"):
        trainable_shares(model | {"layers_to_transform": [0, 4]})
    with pytest.raises(ValueError, match="model_type='bert'; shares are computed of llama only"):
        trainable_shares(model | {"architecture": {"model_type": "bert"}})


def test_share_columns_and_which_reading_is_printed():
    table = built(full=True)
    found = {(cell.row, cell.column): cell.verdict for cell in table.cells if cell.quantity == "share"}
    agreeing = {
        ("Regular FT", "LLaMa-2 gate+up+down of 11 blocks share"),
        ("LoRA", "LLaMa-2 up+down of 32 blocks share"),
    }
    assert len(found) == 12 and {place for place, verdict in found.items() if verdict == "agrees"} == agreeing
    text = table.cell("LoRA", "LLaMa-2 up+down of 11 blocks share")
    assert text.paper == "0.5%" and kinds(text) == {"other_digits"} and text.records == ("conf/model/llama2_7b.yaml",)
    readings = notes(table, "reading")
    assert "the 22% of Regular FT follows from gate+up+down of 11 blocks;" in readings[1]
    assert "the 0.5% of LoRA follows from up+down of 32 blocks at rank 32" in readings[2]
    assert "SparseGrad follows from none of the readings" in readings[3]


# Cells


def test_nothing_run_gives_every_label_of_the_paper_and_a_reason():
    table = built(stands_for={})
    assert table.rows == ("Regular FT", "LoRA", "SparseGrad", "MeProp") and table.columns == (SHARE, LOSS, SCORE)
    assert {(cell.verdict, cell.value, *kinds(cell)) for cell in table.cells} == {("not run", None, "no_model")}
    assert table.models == ("Nothing ran in the place of LLaMa-2 (llama2_7b).",)
    assert notes(table, "judge") == ["Nothing was judged."]


def test_values_by_hand():
    records = [trained("lora", seed, loss, share=0.005) for seed, loss in ((1, 1.20), (2, 1.30), (3, 1.40))]
    table = built(records, [judged("lora", seed, [flat(5), flat(5), flat(8)]) for seed in (1, 2)])
    share, loss, score = (table.cell("LoRA", column) for column in (SHARE, LOSS, SCORE))
    assert (share.value, share.n, share.low) == (pytest.approx(0.5), 3, None)
    # t(0.975, 2) = 4.3027, standard deviation 0.1.
    assert loss.value == pytest.approx(1.3) and loss.high - loss.value == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert loss.records == tuple(f"runs/tiny-lora-{seed}.json" for seed in (1, 2, 3)) and loss.n == 3
    # The median of 5, 5 and 8; 40 items of each of two seeds.
    assert (score.value, score.n) == (pytest.approx(5.0), 80) and 4.4 < score.low < 4.8 < 5.2 < score.high < 5.6
    assert score.records == ("judgments/tiny-lora-1.json", "judgments/tiny-lora-2.json")
    assert all(cell.verdict == "not comparable" and kinds(cell) == {"other_model"} for cell in (share, loss, score))
    assert "Title of tiny (tiny) stands in the place of LLaMa-2" in table.models[0]
    assert "LORA: trained seeds [1, 2, 3], judged seeds [1, 2]." in notes(table, "loss")
    assert kinds(table.cell("Regular FT", LOSS)) == {"no_run"}
    assert kinds(table.cell("Regular FT", SCORE)) == {"no_judgments"}


def test_the_papers_own_model_is_compared():
    own = {"model": "llama2_7b"}
    close = [trained("full", seed, 1.25 + d, share=0.2208, **own) for seed, d in enumerate((-0.002, 0.002))]
    apart = [trained("lora", seed, 2 + d, share=0.00158, **own) for seed, d in enumerate((-0.001, 0.001))]
    one = [trained("meprop", 0, 1.259, share=0.005, **own)]
    table = built([*close, *apart, *one], [judged("full", 1, [flat(5)], **own)], **OWN)
    found = {row: [table.cell(row, column).verdict for column in (SHARE, LOSS, SCORE)] for row in table.rows}
    assert found["Regular FT"] == ["agrees", "inconclusive", "inconclusive"]  # Welch's interval is wider than 0.05
    assert found["LoRA"] == ["differs", "differs", "not run"] and found["MeProp"][1] == "inconclusive"
    assert kinds(table.cell("LoRA", SHARE)) == {"other_digits"}
    assert table.models == ("LLaMa-2 (llama2_7b) is the paper's own model.",)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"judge": {"measures_quality": False}}, "no_quality"),
        ({"judge": {"model": "qwen"}}, "judge no_agreement"),
        ({"judge": {"model": "gpt-4.1-2025-04-14"}}, "judge no_agreement"),
        ({"questions": {"file": "question.jsonl"}}, "questions"),
        ({"questions": {"count": 21}}, "missing_judgments"),
        ({"scale": "local"}, "scale"),
    ],
)
def test_what_makes_a_score_not_comparable(changes, kind):
    cell = built([], [judged("full", 1, [flat(5)], model="llama2_7b", **changes)], **OWN).cell("Regular FT", SCORE)
    assert (cell.verdict, kinds(cell)) == ("not comparable", {*kind.split()})


QWEN = {"name": "own", "model": "qwen", "parsing": "last", "temperature": 0, "max_tokens": 2048}
THEIRS = {"agreement": {"items": 480, "spearman": 0.61, "pearson": None, "kappa": 0.5, "difference": -0.25,
                        "unrated": 0.0125, "noise": 0.1, "models": {}}, "reference": {"judge": "gpt-4"}}  # fmt: skip


@pytest.mark.parametrize(
    ("own", "known", "warned"),
    [
        (QWEN, QWEN, False),
        (QWEN, QWEN | {"max_tokens": 256}, True),
        (QWEN, None, True),
        ({"model": "gpt-4"}, None, False),  # that others are held against
        ({"measures_quality": False}, QWEN, False),  # that says so already
    ],
)
def test_a_judge_stands_beside_its_agreement_or_a_warning(own, known, warned):
    agreements = [] if known is None else [THEIRS | {"judge": known}]
    table = built([], [judged("full", 1, [flat(5)], judge=own)], agreements=agreements)
    cell, shown = table.cell("Regular FT", SCORE), own == known
    assert ("no_agreement" in kinds(cell)) == warned == bool(notes(table, "warning"))
    figures = "agreement with gpt-4 on 480 items: Spearman 0.610, Pearson not defined, quadratic weighted kappa 0.500"
    assert [figures in text for text in notes(table, "agreement")] == [True] * shown
    assert (figures in cell.sources["ours"]) == shown


def test_protocol_and_weights_are_reasons_of_losses():
    records = [trained("full", 1, 1.25, model="llama2_7b", protocol="sound", weights=True)]
    table = built(records, protocol="sound", **OWN)
    assert kinds(table.cell("Regular FT", LOSS)) == {"protocol", "random_weights"}
    assert kinds(table.cell("Regular FT", SHARE)) == {"protocol"}


def test_methods_ablations_and_further_decoders_have_rows():
    records = [trained(method, 1, 1.0 + place) for place, method in enumerate(("full", "dora", "truncated"))]
    records += [trained(method, 1, 2.0, model="other") for method in ("full", "truncated")]
    scores = [judged("full", 1, [flat(5)]), judged("full", 1, [flat(7)], model="other")]
    table = built(records, scores, methods=(*EXPERIMENT.methods, "dora"))
    first = ("Regular FT", "LoRA", "SparseGrad", "MeProp", "DoRA")
    assert table.rows == (*first, "Truncated", *(f"{row}, other" for row in (*first, "Truncated")))
    assert [table.cell(row, LOSS).value for row in ("DoRA", "Truncated", "Regular FT, other")] == [2.0, 3.0, 2.0]
    other = table.cell("Regular FT, other", SCORE)
    assert other.value == pytest.approx(7) and other.model == "other" and kinds(other) == {"not_printed", "other_model"}
    assert table.cell("Truncated", SCORE) is None and table.cell("DoRA", SCORE).verdict == "not run"
    assert table.cell("Truncated", LOSS).flags == ("ablation",)


# What is missing, what is mixed, what is refused


def test_missing_judgments_and_failed_runs():
    part = {item: score for item, score in flat(5).items() if item != (81, 2)}
    failed = [trained(method, 2, None, status="failed") for method in ("full", "lora")]
    scores = [judged("full", 1, [part, flat(5)], answers={"cut": 3, "refused": 1}), judged("lora", 1, [{}, {}])]
    table = built([trained("full", 1, 1.3), *failed], scores)
    assert table.cell("Regular FT", SCORE).n == 40 and "missing_judgments" in kinds(table.cell("Regular FT", SCORE))
    cell = table.cell("LoRA", SCORE)
    assert cell.verdict == "not run" and kinds(cell) == {"missing_judgments"}
    judge = notes(table, "judge")
    assert any(note.startswith("Judgments: 79 of 160 have a rating, read by parsing fastchat; ") for note in judge)
    assert "Prompts longer than the model's window: 3 cut, 1 refused." in judge
    loss = table.cell("Regular FT", LOSS)
    assert loss.n == 1 and loss.flags == ("failed_runs",) and kinds(table.cell("LoRA", LOSS)) == {"no_run", "failed"}
    assert any("Failed runs: 2" in text for text in notes(table, "loss"))


def test_records_of_others_are_left_out_and_listed():
    records = [trained("full", 1, 1.3), trained("full", 2, 9.0, protocol="sound"), trained("dora", 1, 9.0)]
    records.append(trained("full", 4, 0.9, kind="energy"))
    others = [judged("full", 1, [flat(9)], experiment="other", judge={"model": "other"}), judged("full", 1, [flat(5)])]
    others[0] = replace(others[0], path="elsewhere.json")
    table = built(records, others)
    assert table.cell("Regular FT", LOSS).value == 1.3 and table.cell("Regular FT", SCORE).value == pytest.approx(5)
    (note,) = [text for text in notes(table, "loss") if text.startswith("Records left out: 3")]
    assert all(text in note for text in ("protocol sound", "method dora", "experiment other"))


@pytest.mark.parametrize(
    "changes", [{"judge": {"repeats": 2}}, {"judge": {"model": "x"}}, {"questions": {"sha256": "0"}}]
)
def test_mixed_judges_are_refused(changes):
    with pytest.raises(ValueError, match="several judges or question files are mixed"):
        built([], [judged("full", 1, [flat(5)]), judged("lora", 1, [flat(5)], **changes)])


def test_another_port_is_the_same_judge():
    ports = [judged(m, 1, [flat(5)], judge={"endpoint": f"127.0.0.1:{n}"}) for n, m in enumerate(("full", "lora"))]
    assert built([], ports).cell("LoRA", SCORE).value == pytest.approx(5)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([trained("full", 1, float("nan"))], "score is nan; a finished run has a loss >= 0"),
        ([trained("full", 1, -1.0)], "score is -1.0"),
        ([trained("full", 1, 1.0, parameters={"trainable": 2, "total": 1})], "'total': 1"),
        ([trained("full", 1, 1.0, parameters={"trainable": 2})], "there is no 'parameters.total'"),
        ([trained("full", 1, 1.0)] * 2, r"two record files of \('tiny', 'full', 'oasst1', 1\)"),
    ],
)
def test_bad_records(records, message):
    with pytest.raises(ValueError, match=message):
        built(records)
    first = judged("full", 1, [flat(5)])
    with pytest.raises(ValueError, match="two judgment files"):
        built([], [first, replace(first, path="again.json")])


# Pairs of methods


def test_pairs_are_separated_or_inside_the_noise():
    scores = {"full": (5, 5.1), "lora": (7, 7.1), "sparsegrad": (7.05, 7.15)}
    pairs = notes(built([], [judged(m, 1, [flat(one) for one in two]) for m, two in scores.items()]), "pair")
    # Every question differs alike: the interval is a point, and the spread of 0.1 over repeats decides.
    assert len(pairs) == 3 and "FULL - LORA: -2.000 [-2.000, -2.000], noise 0.100: separated (40 items" in pairs[0]
    assert "-0.050 [-0.050, -0.050], noise 0.100: inside the judge's noise" in pairs[2]
    once = [judged(m, 1, [flat(s)], judge={"measures_quality": False}) for m, s in (("full", 5), ("lora", 7))]
    (pair,) = notes(built([], once), "pair")  # without repeats, GPT-4's known noise
    assert "noise 0.200: not comparable in quality (by the rule: separated)" in pair


def test_pairs_without_a_common_item_and_with_some():
    first, second = dict(list(flat(5).items())[:20]), dict(list(flat(5).items())[20:])
    (pair,) = notes(built([], [judged("full", 1, [first]), judged("lora", 1, [second])]), "pair")
    assert "inconclusive" in pair
    (pair,) = notes(built([], [judged("full", 1, [first]), judged("lora", 1, [flat(5)])]), "pair")
    assert "20 items of 10 questions, 20 items not paired" in pair


def test_scores_by_turn_and_category():
    scores = {(question, turn): float(turn * 2 + (question > 90)) for question in range(81, 101) for turn in (1, 2)}
    categories = {question: "math" if question > 90 else "writing" for question in range(81, 101)}
    found = notes(built([], [judged("full", 1, [scores])], categories=categories), "judge")
    assert "FULL: turn 1 2.500, turn 2 4.500, writing 3.000, math 4.000." in found


def test_from_files_on_disk(tmp_path):
    """Judgments as their stage leaves them, through the reader, into the table."""
    whole = judged("full", 1, [flat(5)])
    folder = tmp_path / "tiny" / "full"
    folder.mkdir(parents=True)
    (folder / "tiny-full-seed1.json").write_text(json.dumps(whole.record))
    lines = [line | {"config_hash": "abc"} for line in whole.lines]
    (folder / "tiny-full-seed1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    cell = built([], read_judgments(tmp_path)).cell("Regular FT", SCORE)
    assert cell.n == 39 and "missing_judgments" in kinds(cell)
