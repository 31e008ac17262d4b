"""Scores, repeat noise and comparisons from judgment lines; the reader of a judgments folder."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finetune.mt_bench import comparison, judged, scores
from finetune.mt_bench.comparison import (
    INSIDE_NOISE,
    SEPARATED,
    Comparison,
    bootstrap_score,
    comparison_verdict,
    paired_bootstrap,
    repeat_noise,
)
from finetune.mt_bench.journal import read_items, write_items
from finetune.mt_bench.questions import answer_sha256
from finetune.mt_bench.scores import item_scores, summarize

pytestmark = pytest.mark.usefixtures("believed")

DATA = Path(os.environ.get("SPARSEGRAD_DATA") or Path(__file__).parents[3] / "data")
JUDGMENTS = DATA / "mt_bench" / "judgments" / "gpt-4_single.jsonl"
PUBLISHED = {"mamba_0_5_dpo_ep1": "7.12", "mamba_0_75_dpo_ep3": "6.58", "mamba_0_875_dpo_ep3": "6.37"}
real = pytest.mark.skipif(not JUDGMENTS.is_file(), reason=f"no {JUDGMENTS}: published judgments by GPT-4")


def line(question, turn, score, *, model="m", judge="gpt-4", **extra):
    prompt = "single-v1" if turn == 1 else "single-v1-multi-turn"
    said = {"score": score, "judgment": f"Rating: [[{score}]]"}
    return {"question_id": question, "turn": turn, "model": model, "judge": [judge, prompt]} | said | extra


# FastChat's definition


@real
def test_real_judgments_score_as_published_and_as_fastchat_groups_them():
    """``show_result``'s aggregation with pandas: drop -1, group by model (and turn), mean."""
    lines = read_items(JUDGMENTS)
    models = sorted({one["model"] for one in lines})
    of = {model: [one for one in lines if one["model"] == model] for model in models}
    assert {model: f"{summarize(item_scores(of[model])).average:.2f}" for model in models} == PUBLISHED
    of[models[0]][3]["score"] = of[models[1]][9]["score"] = -1
    frame = pd.DataFrame(lines)[["model", "score", "turn"]].query("score != -1")
    average, turns = frame.groupby("model")["score"].mean(), frame.groupby(["model", "turn"])["score"].mean()
    for model in models:
        score = summarize(item_scores(of[model]))
        assert score.average == pytest.approx(average[model], abs=1e-12)
        assert dict(score.turns) == pytest.approx({turn: turns[model, turn] for turn in (1, 2)}, abs=1e-12)
        assert score.items == (frame["model"] == model).sum()


def test_score_by_hand():
    lines = [line(81, 1, 8), line(81, 2, 5), line(82, 1, 3), line(82, 2, -1)]
    found = summarize(item_scores(lines), {81: "writing", 82: "math"})
    assert found.average == pytest.approx(16 / 3) and found.items == 3
    assert found.turns == {1: 5.5, 2: 5.0} and found.categories == {"writing": 6.5, "math": 3.0}
    assert summarize(item_scores(lines)).categories == {}
    with pytest.raises(ValueError, match="question 82 was judged and has no category"):
        summarize({(82, 1): 5.0}, {81: "writing"})
    assert item_scores([line(81, 1, -1)]) == {} and summarize({}) == scores.Score(None, {}, {}, 0)


def test_repeats_become_their_median():
    lines = [line(81, 1, score, repeat=repeat) for repeat, score in enumerate((2, 9, 10))]
    lines += [line(81, 2, 4, repeat=0), line(81, 2, -1, repeat=1), line(81, 2, 7, repeat=2)]
    assert item_scores(lines) == {(81, 1): 9, (81, 2): 5.5}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(81, 1, 5), line(81, 2, 5, judge="other")], "judgments of several judges are mixed: gpt-4, other"),
        ([line(81, 1, 5), line(81, 2, 5, model="other")], "judgments of several models are mixed: m, other"),
        ([line(81, 1, 5), line(81, 1, 6)], "question 81, turn 1, repeat 0 of m was judged twice"),
        ([line(81, 3, 5)], "turn .1 or 2."),
        ([line(81, 1, None)], "score .1 to 10, or -1."),
        ([line(81, 1, float("nan"))], "score .1 to 10, or -1."),
        ([{"question_id": 81}], "it lacks .'judge', 'model', 'score', 'turn'."),
    ],
)
def test_lines_that_are_no_judgments_of_one_model_by_one_judge(lines, message):
    with pytest.raises(ValueError, match=message):
        item_scores(lines)


# Repeats, intervals, verdicts


def test_repeat_noise_by_hand():
    lines = [line(81, 1, 6, repeat=0), line(82, 1, 8, repeat=0), line(81, 1, 7, repeat=1), line(82, 1, 8, repeat=1)]
    lines += [line(83, 1, 1, repeat=1), line(84, 1, 1, repeat=0), line(84, 1, -1, repeat=1)]
    assert repeat_noise(lines) == 0.5  # of the means 7 and 7.5 over questions 81 and 82: the others lack a repeat
    assert repeat_noise(lines[:2]) is None
    assert repeat_noise([]) is None


def test_score_of_seeds_is_the_mean_of_their_scores():
    seeds = [{(81, 1): 4.0, (82, 1): 8.0}, {(81, 1): 5.0, (81, 2): 6.0, (82, 1): 10.0}]
    found = bootstrap_score(seeds, seed=0)
    assert found.mean == pytest.approx((6 + 7) / 2) and found.n == 5
    # Resamples of two questions are all of one, all of the other, or both.
    assert (found.low, found.high) == (pytest.approx((4 + 5.5) / 2), pytest.approx((8 + 10) / 2))
    assert bootstrap_score([{(81, 1): 4.0}], seed=0) == comparison.Estimate(4.0, None, None, 1)


def test_paired_difference_by_hand():
    first = [{(81, 1): 6.0, (81, 2): 4.0, (82, 1): 9.0}, {(81, 1): 8.0, (81, 2): 4.0, (82, 1): 9.0}]
    second = [{(81, 1): 5.0, (81, 2): 5.0, (82, 2): 1.0, (82, 1): 9.0}]
    found = paired_bootstrap(first, second, seed=0)  # differences 2, -1 and 0; (82, 2) is judged for one alone
    assert found.difference == pytest.approx(1 / 3)
    assert (found.questions, found.items, found.unpaired) == (2, 3, 1)
    assert (found.low, found.high) == (pytest.approx(0.0), pytest.approx(0.5))
    assert paired_bootstrap(second, first, seed=0).difference == pytest.approx(-1 / 3)


def test_stratified_bootstrap_draws_within_categories():
    """Differences that a category shares make no spread when its size is fixed."""
    items = {(question, 1): 9.0 if question < 40 else 1.0 for question in range(80)}
    categories = {question: "a" if question < 40 else "b" for question in range(80)}
    stratified = bootstrap_score([items], seed=0, categories=categories)
    assert (stratified.low, stratified.mean, stratified.high) == pytest.approx((5, 5, 5))
    plain = bootstrap_score([items], seed=0)
    assert plain.low < 4.5 and plain.high > 5.5
    first, again, other = (bootstrap_score([items], seed=seed, samples=10) for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(ValueError, match=r"questions \[79\] have no category"):
        bootstrap_score([items], seed=0, categories=dict.fromkeys(range(79), "a"))


def test_a_question_alone_in_its_category_is_in_every_resample():
    items, categories = {(1, 1): 0.0, (2, 1): 10.0, (3, 1): 4.0}, {1: "a", 2: "a", 3: "b"}
    found = bootstrap_score([items], seed=0, categories=categories)
    assert (found.low, found.high) == pytest.approx(((0 + 0 + 4) / 3, (10 + 10 + 4) / 3))
    assert bootstrap_score([items], seed=0, categories={1: "a", 2: "b", 3: "c"}).low is None


def test_bootstrap_covers_the_true_difference():
    """Simulated scores: two turns that share their question's difficulty, true difference 0.5, 80 questions."""
    generator = np.random.default_rng(7)
    covered = 0
    for number in range(200):
        difficulty = generator.normal(0, 2, (80, 1))
        first = difficulty + generator.normal(0.5, 1.5, (80, 2)) + generator.normal(0, 1, (80, 1))
        second = difficulty + generator.normal(0, 1.5, (80, 2))
        pair = [[{(q, t + 1): float(table[q, t]) for q in range(80) for t in range(2)}] for table in (first, second)]
        found = paired_bootstrap(*pair, seed=number, samples=500)
        covered += found.low <= 0.5 <= found.high
    # 95 % nominal; a percentile bootstrap of 80 questions is a little narrow. 200 draws have a deviation of 1.6 %.
    assert 0.89 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("low", "difference", "high", "noise", "expected"),
    [
        (0.1, 0.5, 0.9, 0.2, SEPARATED),
        (-0.9, -0.5, -0.1, 0.2, SEPARATED),
        (-0.1, 0.5, 1.1, 0.0, INSIDE_NOISE),  # the interval includes 0
        (0.0, 0.5, 1.0, 0.0, INSIDE_NOISE),  # its end is in it
        (0.05, 0.15, 0.25, 0.2, INSIDE_NOISE),  # smaller than the judge's own changes
        (0.05, 0.2, 0.35, 0.2, SEPARATED),
        (None, 3.0, None, 0.0, INSIDE_NOISE),  # one question
    ],
)
def test_verdict(low, difference, high, noise, expected):
    assert comparison_verdict(Comparison(difference, low, high, 80, 160, 0), noise) == expected


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="noise=-1"):
        comparison_verdict(Comparison(1.0, 0.5, 1.5, 80, 160, 0), -1)
    with pytest.raises(ValueError, match="got 0 and 1 seeds"):
        paired_bootstrap([], [{(81, 1): 5.0}], seed=0)
    with pytest.raises(ValueError, match="no item was judged in every one of 2 seeds"):
        paired_bootstrap([{(81, 1): 5.0}], [{(82, 1): 5.0}], seed=0)
    for seeds in ([], [{(81, 1): 5.0}, {}]):
        with pytest.raises(ValueError, match="each needs at least one"):
            bootstrap_score(seeds, seed=0)


# Files

NAME = "m-x-seed1"


def own(*item, **extra):
    return line(*item, model=NAME, config_hash="abc", **extra)


def write_judged(folder, name=NAME, *, lines=None, failures=(), record=None, repeats=1):
    """A record with two questions, its lines, its failures."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "run": dict.fromkeys(("experiment", "method", "protocol", "scale"), "x")
        | {"model": name.partition("-")[0], "seed": 1, "kind": "judgments", "config_hash": "abc"},
        "judge": {"model": "gpt-4", "repeats": repeats}
        | dict.fromkeys(("measures_quality", "temperature", "max_tokens"), 0),
        "questions": {"file": "q.jsonl", "sha256": "0" * 64, "count": 2},
        "answers": {"cut": 0, "refused": 0},
    }
    (folder / f"{name}.json").write_text(json.dumps(content | (record or {})))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines or []))
    if failures:
        (folder / f"{name}.failures.jsonl").write_text("".join(json.dumps(one) + "\n" for one in failures))
    return folder / f"{name}.json"


def whole(**extra):
    """Every item of two questions; `repeat` and `config_hash` as our client writes them."""
    return [own(q, t, q - 80 + t, **extra) for q in (81, 82) for t in (1, 2)]


def test_reader_of_a_complete_folder(tmp_path):
    write_judged(tmp_path / "tiny", lines=[one | {"user_prompt": "a\u2028b"} for one in whole(repeat=0)])
    (found,) = judged.read_judgments(tmp_path)
    assert (found.expected, found.missing, found.foreign, found.shortfall()) == (4, 0, 0, "")
    assert found.items() == {(81, 1): 2, (81, 2): 3, (82, 1): 3, (82, 2): 4}


def test_missing_and_failed_items_are_counted(tmp_path):
    lines = [*whole(repeat=0)[:3], whole(repeat=1)[0], own(82, 2, -1, repeat=0)]
    failure = {"question_id": 82, "turn": 2, "repeat": 0, "judge": ["gpt-4", "single-v1"], "error": "no rating"}
    found = judged.read_judged(write_judged(tmp_path, lines=lines, failures=[failure], repeats=2))
    assert (found.expected, len(found.lines), found.missing) == (8, 4, 4)
    assert found.shortfall() == "4 of 8 judgments have a rating (1 listed as failures), 1 of 4 items have none"
    assert (82, 2) not in found.items()


def test_only_what_belongs_to_the_record_counts(tmp_path):
    lines = whole(repeat=0)
    foreign = [
        lines[0] | {"config_hash": "old", "score": "no"},
        lines[0] | {"model": "other"},
        lines[0] | {"judge": ["gpt-3", "single-v1"]},
        lines[0] | {"repeat": 1},
    ]
    again = own(81, 1, 9, repeat=0)  # of two lines of an item the last counts
    found = judged.read_judged(write_judged(tmp_path, lines=[*foreign, *lines, again]))
    assert (found.foreign, found.missing) == (4, 0)
    assert found.items() == {(81, 1): 9, (81, 2): 3, (82, 1): 3, (82, 2): 4}
    assert "4 lines of another configuration, judge or model not counted" in found.shortfall()


def test_records_that_a_cell_no_longer_lists_are_passed_over(tmp_path):
    write_judged(tmp_path / "cell", lines=whole())
    write_judged(tmp_path / "cell", "stale-x-seed1", lines=[])
    write_judged(tmp_path / "cell" / "earlier", lines=[])
    (tmp_path / "answers.json").write_text('{"run": {"kind": "answers"}}')  # not judgments
    (tmp_path / "cell" / "cell.json").write_text(json.dumps({"records": [f"{NAME}.json"]}))
    assert [found.path for found in judged.read_judgments(tmp_path)] == [(tmp_path / f"cell/{NAME}.json").as_posix()]
    (tmp_path / "cell" / "cell.json").unlink()
    assert len(list(judged.read_judgments(tmp_path))) == 3


def test_more_judgments_than_items(tmp_path):
    lines = [*whole(), own(83, 1, 5)]
    with pytest.raises(ValueError, match="speaks of 4 judgments, its file holds 5"):
        judged.read_judged(write_judged(tmp_path, lines=lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist: run the stage"),
        ('{"question_id": 81}\n{"torn', "line 2"),
        (
            f'{{"model": "{NAME}", "judge": ["gpt-4", "p"], "config_hash": "abc", "turn": 1}}\n',
            "question_id=None and turn=1 name no item; run the judgments stage again",
        ),
    ],
)
def test_damaged_files(tmp_path, text, message):
    path = write_judged(tmp_path)
    if text is None:
        path.with_suffix(".jsonl").unlink()
    else:
        path.with_suffix(".jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        judged.read_judged(path)


TURNS = {81: ["a", "b"], 82: ["c", "d"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": 9}, "question 81, turn 2 has score=9, which is not what the judge's words say; run the judgments"),
        ({"score": 0.5, "judgment": "[[0.5]]"}, "score=0.5; it must be a number from 1 to 10"),
        ({"score": "3"}, "score='3'; it must be"),
        ({"score": True, "judgment": "[[1]]"}, "score=True; it must be"),
        ({"judgment": None}, "not what the judge's words say"),
        ({"question_id": "81"}, "question_id='81' and turn=2 name no item"),
        (
            {"answer_sha256": answer_sha256(["a", "c"])},
            "question 81, turn 2 was judged on another answer than there is",
        ),
        ({"turn": 1}, "question 81, turn 1 was judged on another answer"),
    ],
)
def test_a_judgment_that_is_not_believed_is_refused(tmp_path, change, message):
    held = [own(q, t, 3, answer_sha256=answer_sha256(TURNS[q][:t]), repeat=0) for q in (81, 82) for t in (1, 2)]
    path = write_judged(tmp_path / "judgments" / "tiny", lines=[held[0], held[1] | change, *held[2:]])
    answers = tmp_path / "answers" / "tiny" / f"{NAME}.jsonl"
    answers.parent.mkdir(parents=True)
    write_items(answers, [{"question_id": q, "choices": [{"turns": turns}]} for q, turns in TURNS.items()])
    with pytest.raises(ValueError, match=rf"{NAME}\.jsonl, judgment 2: .*{message}"):
        judged.read_judged(path)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    assert len(judged.read_judged(path).lines) == 4
    answers.write_text(answers.read_text().replace('"d"', '"e"'))
    with pytest.raises(ValueError, match="answers/tiny/.*line 2: it was changed after it was written"):
        judged.read_judged(path)


@pytest.mark.parametrize(("parsing", "scores"), [("last", [3, 3]), ("fastchat", [9, 9]), (None, [9, 9])])
def test_a_score_is_what_the_records_parsing_reads(tmp_path, parsing, scores):
    words = "The format is [[9]]. Rating: [[3]]"
    held = [own(81, t, score, judgment=words) for t, score in zip((1, 2), scores, strict=True)]
    judge = {"model": "gpt-4", "repeats": 1} | dict.fromkeys(("measures_quality", "temperature", "max_tokens"), 0)
    record = {"judge": judge | ({"parsing": parsing} if parsing else {})}
    failures = [{"judgment": "as [4]"}, {"judgment": "none"}, {"error": "HTTP 500"}]
    path = write_judged(tmp_path, lines=held, record=record, failures=failures)
    found = judged.read_judged(path)
    assert found.items() == {(81, 1): scores[0], (81, 2): scores[1]}
    assert (found.parsing, found.differing) == (parsing or "fastchat", 3)
    write_judged(tmp_path, lines=held, record={"judge": judge | {"parsing": "last" if scores[0] == 9 else "fastchat"}})
    with pytest.raises(ValueError, match="not what the judge's words say"):
        judged.read_judged(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"questions": {"file": "q", "sha256": "0", "count": "2"}}, "has count='2', no count"),
        ({"answers": {"cut": -1, "refused": 0}}, "has cut=-1, no count"),
        (
            {"run": dict.fromkeys("experiment model method seed protocol scale config_hash".split(), "y")},
            "record of y-y-",
        ),
    ],
)
def test_a_record_that_is_not_its_own_is_refused(tmp_path, record, message):
    with pytest.raises(ValueError, match=f"{message}.*run the judgments stage again"):
        judged.read_judged(write_judged(tmp_path, lines=whole(), record=record))


def test_record_without_a_judge(tmp_path):
    path = write_judged(tmp_path, record={"judge": {"model": "gpt-4"}})
    with pytest.raises(ValueError, match=r"lacks judge.measures_quality, judge.temperature, .*run the judgments stage"):
        judged.read_judged(path)
