"""Table 6 from LLaMa records and judgments: values, shares, verdicts, what is missing, what is mixed."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from finetune.mt_bench.judged import Judged, read_judgments
from finetune.published import paper_table
from finetune.report.evidence.llama_evidence import collect_llama_evidence
from finetune.report.paper.architectures import mlp_matrices
from finetune.report.paper.shares import trainable_shares
from finetune.report.tables import writers
from finetune.report.tables.rows import COLUMNS
from finetune.report.tables.table_06 import build_table_06
from finetune.report.tables.tables import write_table

CONF = Path(__file__).parents[3] / "conf" / "model" / "llama2_7b.yaml"
FULL = yaml.safe_load(CONF.read_text(encoding="utf-8"))
PRINTED = ["#Train params", "Valid Loss", "I-Bench Score"]
LABELS = {"full": "Regular FT", "lora": "LoRA", "sparsegrad": "SparseGrad", "meprop": "MeProp"}
OWN = {"llama2_7b": "llama2_7b"}
TINY = {"llama2_7b": "tiny"}


def run_of(kind, model, method, seed, **changes):
    run = {"experiment": "test", "kind": kind, "model": model, "method": method, "task": "oasst1", "seed": seed}
    run |= {"protocol": "printed", "scale": "paper", "config_hash": "abc"}
    return run | {name: value for name, value in changes.items() if name in run}


def trained(method, seed, loss, *, model="tiny", share=0.25, **changes):
    record = {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "score": loss,
        "metric": "loss",
        "run": run_of("llama", model, method, seed, **changes),
        "parameters": {"trainable": round(1_000_000 * share), "total": 1_000_000},
        "model": {"title": f"Title of {model}", "random_weights": False},
    }
    record |= {name: value for name, value in changes.items() if name in record}
    return f"runs/{method}-{seed}.json", record


def judged(method, seed, by_repeat, *, model="tiny", judge=None, questions=None, answers=None, **changes):
    """Judgments whose scores are given by repeat: repeat -> {(question, turn): score}."""
    record = {
        "run": run_of("judgments", model, method, seed, **changes),
        "judge": {
            "model": "gpt-4",
            "measures_quality": True,
            "temperature": 0,
            "max_tokens": 2048,
            "repeats": len(by_repeat),
        }
        | (judge or {}),
        "questions": {"file": "mt_bench_inf.jsonl", "sha256": "f" * 64, "count": 20} | (questions or {}),
        "answers": {"cut": 0, "refused": 0} | (answers or {}),
    }
    lines = [
        {
            "question_id": question,
            "turn": turn,
            "score": score,
            "model": f"{model}-{method}-seed{seed}",
            "judge": [record["judge"]["model"], "single-v1"],
            "repeat": repeat,
        }
        for repeat, scores in enumerate(by_repeat)
        for (question, turn), score in scores.items()
    ]
    return Judged(f"judgments/{method}-{seed}.json", record, tuple(lines), (), 0)


def flat(score, questions=20):
    """Every item of the questions with about the same score: it varies by +-1 over questions, and not over turns."""
    return {(81 + q, turn): score + (-1) ** q for q in range(questions) for turn in (1, 2)}


def table(records=(), judgments=(), *, stands_for=TINY, protocol="printed", full=None, **options):
    evidence = collect_llama_evidence(
        experiment="test", protocol=protocol, stands_for=stands_for, records=records, judgments=judgments
    )
    rows, context = build_table_06(evidence, full_model=full, **options)
    return {(row["row"], row["column"]): row for row in rows}, context, rows


# Shares of LLaMa-2-7B


@pytest.fixture(scope="module")
def shares():
    return trainable_shares(FULL)


def test_trainable_shares_to_the_digits(shares):
    assert shares.total == 6_738_415_616 and shares.matrix == 11008 * 4096
    assert [variant.name for variant in shares.variants] == [
        "up+down of 11 blocks",
        "gate+up+down of 11 blocks",
        "up+down of 32 blocks",
    ]
    text, gated, every = (variant.shares for variant in shares.variants)
    assert (f"{text['full']:.2f}", f"{gated['full']:.2f}") == ("14.72", "22.08")
    assert (f"{text['lora']:.3f}", f"{every['lora']:.3f}") == ("0.158", "0.459")
    # By hand: 22, 33 and 64 matrices.
    for found, matrices in ((text, 22), (gated, 33), (every, 64)):
        assert found["full"] == pytest.approx(100 * matrices * 45_088_768 / 6_738_415_616)
        assert found["lora"] == pytest.approx(100 * matrices * 32 * (11008 + 4096) / 6_738_415_616)
        assert found["sparsegrad"] == found["meprop"] == pytest.approx(100 * matrices * 1e5 / 6_738_415_616)
    assert shares.gate == pytest.approx(100 * 11 * 45_088_768 / 6_738_415_616)


def test_shares_follow_the_configuration():
    small = FULL["architecture"] | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100}
    model = {"architecture": small, "layers_to_transform": [0, 3], "lora_rank": 2, "k": 50}
    found = trainable_shares(model)
    assert next(variant.name for variant in found.variants) == "up+down of 2 blocks"
    assert found.variants[0].shares["lora"] == pytest.approx(100 * 4 * 2 * (64 + 96) / found.total)
    assert trainable_shares(model | {"layers_to_transform": None}).variants[0].name == "up+down of 4 blocks"
    with pytest.raises(ValueError, match=r"layers_to_transform has \[4\]; the model's blocks are 0 to 3"):
        trainable_shares(model | {"layers_to_transform": [0, 4]})
    with pytest.raises(ValueError, match="model_type='bert'; MLP matrices are listed of llama only"):
        mlp_matrices({"model_type": "bert"})


def test_share_columns_and_which_reading_is_printed(monkeypatch, shares):
    monkeypatch.setattr("finetune.report.tables.table_06.trainable_shares", lambda model: shares)
    cells, context, _ = table(full=("conf/model/llama2_7b.yaml", FULL))
    gated, text = "LLaMa-2 gate+up+down of 11 blocks share", "LLaMa-2 up+down of 11 blocks share"
    every = "LLaMa-2 up+down of 32 blocks share"
    assert cells["Regular FT", gated]["verdict"] == "agrees" == cells["LoRA", every]["verdict"]
    verdicts = {key: row["verdict"] for key, row in cells.items() if key[1] in (gated, text, every)}
    assert len(verdicts) == 12 and list(verdicts.values()).count("differs") == 10
    assert cells["LoRA", text]["paper"] == "0.5%" and cells["LoRA", text]["records"] == "conf/model/llama2_7b.yaml"
    notes = {note.split(":")[0]: note for note in context.notes if note.startswith("D1")}
    assert set(notes) == {"D17", "D18", "D19"}
    assert "the 22% of Regular FT follows from gate+up+down of 11 blocks;" in notes["D17"]
    assert "14.72 %" in notes["D17"] and "22.08 %" in notes["D17"]
    assert "the 0.5% of LoRA follows from up+down of 32 blocks at rank 32 (0.459 %)" in notes["D18"]
    assert "(0.158 %)" in notes["D18"]
    assert "SparseGrad follows from none of the readings" in notes["D19"]
    assert "0.222 % of one matrix" in notes["D19"] and "7.36 % more" in notes["D19"]
    assert "6,738,415,616 parameters" in "".join(context.notes)


# Cells


def test_nothing_run_gives_every_label_of_the_paper_and_a_reason(tmp_path):
    _cells, context, rows = table(stands_for={})
    printed = paper_table(6)
    assert [(row["row"], row["column"], row["paper"], row["paper_std"]) for row in rows] == [
        (cell["row"], cell["column"], cell["value"], cell["std"]) for cell in printed
    ]
    assert all(tuple(row) == COLUMNS and row["ours"] is None for row in rows)
    assert {row["verdict"] for row in rows} == {"not run"}
    assert all("no model ran in llama2_7b's place" in row["source"] for row in rows)
    assert context.models == ("Nothing ran in the place of LLaMa-2 (llama2_7b).",)
    assert "Nothing was judged." in context.notes
    for path in write_table(tmp_path, 6, rows, context):
        assert path.read_text(encoding="utf-8")


def test_training_without_judgments_and_judgments_without_training():
    cells, _, _ = table([trained("full", 1, 1.3)], [judged("lora", 1, [flat(5)])])
    assert cells["Regular FT", "Valid Loss"]["ours"] == 1.3
    assert "no judgments of answers by tiny (full)" in cells["Regular FT", "I-Bench Score"]["source"]
    assert cells["LoRA", "I-Bench Score"]["ours"] == pytest.approx(5)
    assert "no finished run of tiny (lora)" in cells["LoRA", "Valid Loss"]["source"]
    assert cells["Regular FT", "I-Bench Score"]["verdict"] == cells["LoRA", "#Train params"]["verdict"] == "not run"


def test_values_by_hand():
    records = [trained("lora", seed, loss, share=0.005) for seed, loss in ((1, 1.20), (2, 1.30), (3, 1.40))]
    scores = [judged("lora", seed, [flat(5), flat(5), flat(8)]) for seed in (1, 2)]
    cells, context, _ = table(records, scores)
    share, loss, score = (cells["LoRA", column] for column in PRINTED)
    assert (share["ours"], share["n"], share["ours_low"]) == (pytest.approx(0.5), 3, None)
    assert "ours: 5,000 of 1,000,000 parameters" in share["source"]
    # t(0.975, 2) = 4.3027, standard deviation 0.1.
    assert loss["ours"] == pytest.approx(1.3) and loss["n"] == 3
    assert loss["ours_high"] - loss["ours"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert loss["records"] == "runs/lora-1.json;runs/lora-2.json;runs/lora-3.json"
    # The median of 5, 5 and 8; 40 items of each of two seeds.
    assert (score["ours"], score["n"]) == (pytest.approx(5.0), 80)
    assert 4.4 < score["ours_low"] < 4.8 < 5.2 < score["ours_high"] < 5.6
    assert score["records"] == "judgments/lora-1.json;judgments/lora-2.json"
    assert {row["verdict"] for key, row in cells.items() if key[0] == "LoRA"} == {"not comparable"}
    assert "tiny is not the paper's llama2_7b" in score["source"]
    assert "Title of tiny (tiny) stands in the place of LLaMa-2 (llama2_7b). It is not" in context.models[0]
    assert "LoRA: trained seeds [1, 2, 3], judged seeds [1, 2]." in context.notes


def test_the_papers_own_model_is_compared():
    close = [trained("full", seed, 1.25 + d, model="llama2_7b", share=0.2208) for seed, d in enumerate((-0.002, 0.002))]
    apart = [trained("lora", seed, 2 + d, model="llama2_7b", share=0.00158) for seed, d in enumerate((-0.001, 0.001))]
    one = [trained("meprop", 0, 1.259, model="llama2_7b", share=0.005)]
    scores = [judged("full", 1, [flat(5)], model="llama2_7b")]
    cells, context, _ = table([*close, *apart, *one], scores, stands_for=OWN)
    assert [cells["Regular FT", column]["verdict"] for column in PRINTED] == ["agrees", "inconclusive", "inconclusive"]
    assert cells["LoRA", "#Train params"]["verdict"] == "differs"
    assert "0.16% rounds to 0.2%, the paper prints 0.5%" in cells["LoRA", "#Train params"]["source"]
    assert cells["LoRA", "Valid Loss"]["verdict"] == "differs"
    assert cells["MeProp", "Valid Loss"]["verdict"] == "inconclusive" and cells["MeProp", "Valid Loss"]["n"] == 1
    assert context.models == ("LLaMa-2 (llama2_7b) is the paper's own model.",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"judge": {"measures_quality": False}}, "the judge's scores are no measure of quality"),
        ({"judge": {"model": "qwen"}}, "judge qwen is not the paper's GPT-4"),
        ({"judge": {"model": "gpt-4.1-2025-04-14"}}, "judge gpt-4.1-2025-04-14 is not the paper's GPT-4"),
        ({"questions": {"file": "question.jsonl"}}, "questions question.jsonl are not the paper's mt_bench_inf"),
        ({"questions": {"count": 21}}, "2 judgments are missing"),
        ({"scale": "local"}, "scale local is not the paper's"),
    ],
)
def test_what_makes_a_score_not_comparable(changes, reason):
    cells, context, _ = table([], [judged("full", 1, [flat(5)], model="llama2_7b", **changes)], stands_for=OWN)
    row = cells["Regular FT", "I-Bench Score"]
    assert row["verdict"] == "not comparable" and reason in row["source"]
    quality = "no measure of quality" in reason
    assert any("Its scores are no measure of quality." in note for note in context.notes) == quality


def test_sound_protocol_and_random_weights_are_not_comparable():
    _, record = trained("full", 1, 1.25, model="llama2_7b", protocol="sound")
    record["model"]["random_weights"] = True
    cells, context, _ = table([("x.json", record)], stands_for=OWN, protocol="sound")
    source = cells["Regular FT", "Valid Loss"]["source"]
    assert "protocol sound is not the paper's" in source and "started from random weights" in source
    assert "random" not in cells["Regular FT", "#Train params"]["source"]
    assert "LLaMa-2 (llama2_7b) started from random weights." not in context.models[0]
    assert any("started from random weights" in text for text in context.models)


# What is missing, what is mixed


def test_missing_judgments_are_said_and_the_score_is_over_what_is_there():
    part = {item: score for item, score in flat(5).items() if item != (81, 2)}
    found = judged("full", 1, [part, flat(5)], answers={"cut": 3, "refused": 1})
    cells, context, _ = table([], [found])
    row = cells["Regular FT", "I-Bench Score"]
    assert row["n"] == 40 and "79 of 80 judgments have a rating" in row["source"]
    assert "Judgments without a rating: 1 of 80." in context.notes
    assert "Prompts longer than the model's window: 3 cut, 1 refused." in context.notes
    complete = table([], [judged("full", 1, [flat(5)])])[1]
    assert "Judgments: all 40 have a rating." in complete.notes


def test_no_judgment_with_a_rating():
    cells, context, _ = table([], [judged("full", 1, [{}])])
    row = cells["Regular FT", "I-Bench Score"]
    assert row["verdict"] == "not run" and "0 of 40 judgments have a rating" in row["source"]
    assert "Judgments without a rating: 40 of 40." in context.notes


def test_failed_runs_are_counted():
    records = [trained("full", 1, 1.3), trained("full", 2, None, status="failed"), trained("lora", 1, None)]
    records[2][1]["status"] = "failed"
    cells, context, _ = table(records)
    assert cells["Regular FT", "Valid Loss"]["n"] == 1
    assert "failed runs left out: 1" in cells["Regular FT", "Valid Loss"]["source"]
    assert "failed runs: 1 (runs/lora-1.json)" in cells["LoRA", "Valid Loss"]["source"]
    assert "Failed runs: 2 (runs/full-2.json, runs/lora-1.json)." in context.notes


def test_records_of_others_are_left_out_and_listed():
    records = [trained("full", 1, 1.3), trained("full", 2, 9.0, protocol="sound"), trained("full", 3, 9.0, model="big")]
    records.append(trained("full", 4, 9.0))
    records[-1][1]["run"]["kind"] = "train"  # a GLUE run: of other tables, and not listed
    others = [judged("full", 1, [flat(9)], experiment="other", judge={"model": "other"}), judged("full", 1, [flat(5)])]
    cells, context, _ = table(records, others)
    assert cells["Regular FT", "Valid Loss"]["ours"] == 1.3
    assert cells["Regular FT", "I-Bench Score"]["ours"] == pytest.approx(5)
    (note,) = [note for note in context.notes if note.startswith("Records left out: 3")]
    assert all(text in note for text in ("protocol sound", "model big", "experiment other"))


def test_mixed_versions_are_said():
    _, context, _ = table([trained("full", 1, 1.3), trained("lora", 1, 1.3, version=2)])
    assert "Mixed versions of the configuration: 1, 2." in context.notes


@pytest.mark.parametrize(
    "changes",
    [
        {"judge": {"model": "gpt-4o"}},
        {"judge": {"repeats": 2}},
        {"judge": {"measures_quality": False}},
        {"questions": {"sha256": "0" * 64}},
    ],
)
def test_mixed_judges_are_refused(changes):
    with pytest.raises(ValueError, match="several judges or question files are mixed .*run the judgments stage again"):
        table([], [judged("full", 1, [flat(5)]), judged("lora", 1, [flat(5)], **changes)])


def test_another_port_is_the_same_judge():
    ports = [judged(m, 1, [flat(5)], judge={"endpoint": f"127.0.0.1:{n}"}) for n, m in enumerate(("full", "lora"))]
    assert table([], ports)[0]["LoRA", "I-Bench Score"]["ours"] == pytest.approx(5)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([trained("full", 1, float("nan"))], "score is nan; a finished run has the best validation loss there"),
        ([trained("full", 1, None)], "score is None"),
        ([trained("full", 1, 1.0, parameters={"trainable": 2, "total": 1})], "trainable at most total"),
        ([trained("full", 1, 1.0, schema=2)], "schema=2"),
        ([trained("full", 1, 1.0)] * 2, r"two record files of \('tiny', 'full', 1\)"),
        ([("x.json", {"run": {"kind": "llama"}})], "x.json: there is no 'run.experiment'"),
    ],
)
def test_bad_records(records, message):
    with pytest.raises(ValueError, match=message):
        table(records)


def test_two_judgments_of_a_seed_and_unknown_places():
    with pytest.raises(ValueError, match="two judgment files"):
        table([], [judged("full", 1, [flat(5)]), judged("full", 1, [flat(6)])])
    with pytest.raises(ValueError, match="its keys are the paper's models"):
        table(stands_for={"llama": "tiny"})


# Pairs of methods


def pair_notes(*found, **options):
    notes = table([], found, **options)[1].notes
    return [note for note in notes if " - " in note and "questions" in note and note.split(" - ")[0] in LABELS.values()]


def test_pairs_are_separated_or_inside_the_noise():
    found = [
        judged("full", 1, [flat(5), flat(5.1)]),
        judged("lora", 1, [flat(7), flat(7.1)]),
        judged("sparsegrad", 1, [flat(7.05), flat(7.15)]),
    ]
    notes = pair_notes(*found)
    assert [note.split(":")[0] for note in notes] == [
        "Regular FT - LoRA",
        "Regular FT - SparseGrad",
        "LoRA - SparseGrad",
    ]
    # Every question differs alike: the interval is a point, and the spread of 0.1 over repeats decides.
    assert "-2.000 [-2.000, -2.000], noise 0.100: separated (40 items of 20 questions)" in notes[0]
    assert "-0.050 [-0.050, -0.050], noise 0.100: inside the judge's noise" in notes[2]


def test_known_noise_of_gpt_4_stands_in_without_repeats():
    found = [judged("full", 1, [flat(5)]), judged("lora", 1, [flat(5.15)]), judged("meprop", 1, [flat(5.3)])]
    notes = pair_notes(*found)
    assert "-0.150 [-0.150, -0.150], noise 0.200: inside the judge's noise" in notes[0]
    assert "-0.300 [-0.300, -0.300], noise 0.200: separated" in notes[1]
    (rule,) = [note for note in table([], found)[1].notes if note.startswith("Two methods are separated")]
    assert "0.2 points, known of GPT-4" in rule


def test_pairs_of_a_judge_that_measures_no_quality():
    found = [judged(m, 1, [flat(s)], judge={"measures_quality": False}) for m, s in (("full", 5), ("lora", 7))]
    (note,) = pair_notes(*found)
    assert "noise 0.200: not comparable in quality (by the rule: separated)" in note


def test_pairs_without_a_common_item_and_with_some():
    first, second = dict(list(flat(5).items())[:20]), dict(list(flat(5).items())[20:])
    notes = table([], [judged("full", 1, [first]), judged("lora", 1, [second])])[1].notes
    assert "Regular FT - LoRA: inconclusive, no item was judged for every seed of both." in notes
    (note,) = pair_notes(judged("full", 1, [first]), judged("lora", 1, [flat(5)]))
    assert "20 items of 10 questions, 20 items not paired" in note


def test_scores_by_turn_and_category():
    scores = {(question, turn): float(turn * 2 + (question > 90)) for question in range(81, 101) for turn in (1, 2)}
    categories = {question: "math" if question > 90 else "writing" for question in range(81, 101)}
    notes = table([], [judged("full", 1, [scores])], categories=categories)[1].notes
    assert "Regular FT: turn 1 2.500, turn 2 4.500, writing 3.000, math 4.000." in notes
    twice = table([], [judged("full", 1, [flat(5), flat(5.25)])])[1].notes
    assert "Regular FT: turn 1 5.125, turn 2 5.125, spread of a mean over repeats 0.250." in twice


# Files


def test_written_files(tmp_path, monkeypatch, shares):
    monkeypatch.setattr("finetune.report.tables.table_06.trainable_shares", lambda model: shares)
    records = [trained(method, seed, 1.3 + seed / 100) for method in LABELS for seed in (1, 2)]
    scores = [judged(method, seed, [flat(5), flat(6)]) for method in LABELS for seed in (1, 2)]
    _, context, rows = table(records, scores, full=("conf/model/llama2_7b.yaml", FULL))
    paths = write_table(tmp_path, 6, rows, context)
    assert [path.name for path in paths] == ["table_06.csv", "table_06.md", "table_06.tex"]
    with paths[0].open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 24 and float(found[0]["ours"]) == 25.0
    markdown, latex = (path.read_text(encoding="utf-8") for path in paths[1:])
    for text in (markdown, latex.replace("\\%", "%")):
        assert all(number in text for number in ("22.08%", "14.72%", "0.158%", "0.459%", "0.0326%", "1.3150", "5.500"))
    assert "n (seeds; judged items of all seeds in the column I-Bench Score): 2 to 80." in markdown
    body = [line for line in latex.splitlines() if line.endswith(r" \\")]
    assert {line.replace(r"\&", "").count("&") for line in body} == {7} and latex.isascii()
    assert writers.to_csv(rows) == paths[0].read_text(encoding="utf-8")


def test_from_files_on_disk(tmp_path):
    """Judgments as their stage leaves them, through the reader, into the table."""
    whole = judged("full", 1, [flat(5)])
    folder = tmp_path / "tiny" / "full"
    folder.mkdir(parents=True)
    name = "tiny-full-seed1"
    (folder / f"{name}.json").write_text(json.dumps(whole.record))
    lines = [line | {"config_hash": "abc"} for line in whole.lines]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    failure = {"question_id": 81, "turn": 1, "repeat": 0, "judge": ["gpt-4", "single-v1"], "error": "429"}
    (folder / f"{name}.failures.jsonl").write_text(json.dumps(failure) + "\n")
    cells, _context, _ = table([], read_judgments(tmp_path))
    row = cells["Regular FT", "I-Bench Score"]
    assert row["n"] == 39
    assert "39 of 40 judgments have a rating (1 listed as failures), 1 of 40 items have none" in row["source"]
