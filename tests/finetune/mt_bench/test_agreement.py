"""A judge held against another: figures against scipy and sklearn, answers taken from prompts, what is asked."""

import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import judge_endpoint as bench
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from finetune.mt_bench.agreement import agreement_of, in_words, measure, read_agreements
from finetune.mt_bench.journal import read_items
from finetune.mt_bench.judgment_cells import read_bench
from finetune.mt_bench.questions import load_references
from finetune.mt_bench.reference_judgments import choose, read_reference
from finetune.mt_bench.validation import validate_judge
from finetune.store.records import read_record

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("SPARSEGRAD_DATA", ROOT / "data")) / "mt_bench"
MODELS = ("alpha", "beta")


def lines(model, *repeats):
    """Judgments of a model: item -> score, of each repeat."""
    return [
        {"question_id": n, "turn": turn, "score": score, "model": model, "judge": ["judge", "p"], "repeat": repeat}
        for repeat, scores in enumerate(repeats)
        for (n, turn), score in scores.items()
    ]


# ---- figures ----


def test_figures_are_scipys_and_sklearns():
    draw = np.random.default_rng(0)
    items = [(n, turn) for n in range(40) for turn in (1, 2)]
    theirs = {model: {item: float(draw.integers(1, 11)) for item in items} for model in MODELS}
    theirs["beta"][3, 1] = 8.5  # GPT-4 says that too
    ours = {m: {item: int(np.clip(s + draw.integers(-3, 4), 1, 10)) for item, s in theirs[m].items()} for m in MODELS}
    found = measure(theirs, {model: lines(model, scores) for model, scores in ours.items()}, 160)
    x, y = (np.array([side[model][item] for model in MODELS for item in items]) for side in (theirs, ours))
    assert found["items"] == 160 and found["unrated"] == 0 and found["noise"] is None
    assert found["spearman"] == pytest.approx(stats.pearsonr(stats.rankdata(x), stats.rankdata(y)).statistic)
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["difference"] == pytest.approx((y - x).mean())
    apart = np.subtract.outer(x, y) ** 2  # by the definition: observed over expected squared distance
    assert found["kappa"] == pytest.approx(1 - ((x - y) ** 2).mean() / apart.mean())
    whole = cohen_kappa_score(np.rint(x).astype(int), y.astype(int), weights="quadratic")
    assert found["kappa"] == pytest.approx(whole, abs=0.01)  # one of 160 is a half


def test_positions_repeats_and_shares_by_hand():
    theirs = {"alpha": {(1, 1): 9.0, (1, 2): 7.0}, "beta": {(1, 1): 5.0, (1, 2): 4.0}, "gamma": {(1, 1): 1.0}}
    ours = {
        "alpha": lines("alpha", {(1, 1): 2, (1, 2): 2}, {(1, 1): 4, (1, 2): 3}, {(1, 1): 4}),
        "beta": lines("beta", {(1, 1): 4}, {(1, 1): 4}),
        "gamma": [],
    }
    found = measure(theirs, ours, 12)
    assert found["items"] == 3 and found["unrated"] == pytest.approx(1 - 7 / 12)
    # Of the one item that every repeat has: means 2, 4 and 4.
    assert found["noise"] == pytest.approx(2)
    assert found["models"] == {
        "alpha": {"items": 2, "reference": {"mean": 8.0, "rank": 1}, "judge": {"mean": 3.25, "rank": 2}},
        "beta": {"items": 1, "reference": {"mean": 5.0, "rank": 2}, "judge": {"mean": 4.0, "rank": 1}},
    }


def test_what_is_not_defined_is_none():
    theirs = {"alpha": {(1, 1): 9.0, (1, 2): 7.0}}
    same = measure(theirs, {"alpha": lines("alpha", {(1, 1): 5, (1, 2): 5})}, 2)
    assert [same[name] for name in ("spearman", "pearson", "kappa", "difference")] == [None, None, None, -3.0]
    nothing = measure(theirs, {"alpha": []}, 2)
    assert nothing["items"] == 0 and nothing["unrated"] == 1 and nothing["difference"] is None
    record = {"agreement": nothing, "reference": {"judge": "gpt-4"}}
    assert "Spearman not defined" in in_words(record) and "100.0 % without a rating" in in_words(record)


def test_a_part_is_stratified_and_a_larger_one_holds_it():
    questions = [{"question_id": n, "category": f"c{n % 4}"} for n in range(40)]
    parts = [{q["question_id"] for q in choose(questions, part, 3)} for part in range(1, 41)]
    assert [len(part) for part in parts] == [*range(1, 41)]
    assert all(small < large for small, large in pairwise(parts))
    assert {*Counter(n % 4 for n in parts[13]).values()} == {3, 4}
    assert choose(questions, None, 0) == questions and choose(questions, 9, 0) != choose(questions, 9, 1)
    with pytest.raises(ValueError, match="part=41 questions; there are 40"):
        choose(questions, 41, 0)


# ---- the published judgments ----


def published(number=4):
    """Judgments of two models over the small bench; the answers name their model."""
    found = []
    for model in MODELS:
        for question in bench.questions(number):
            n = question["question_id"]
            turns = [f"answer {n} first of {model}\n", f"answer {n} second of {model}"]
            for turn in (1, 2):
                name = f"single{'-math' if question['category'] == 'math' else ''}-v1{'-multi-turn' * (turn - 1)}"
                fields = {"question": question["turns"][0], "answer": turns[0]}
                for place in (1, 2):
                    fields |= {
                        f"question_{place}": question["turns"][place - 1],
                        f"answer_{place}": turns[place - 1],
                        f"ref_answer_{place}": question["reference"][place - 1],
                    }
                prompt = bench.prompts()[name]["prompt_template"].format(**fields)
                facts = {"question_id": n, "model": model, "judge": ["gpt-4", name], "turn": turn}
                found.append(facts | {"user_prompt": prompt, "score": min(10, n + turn + (model == "alpha"))})
    return found


@pytest.fixture
def given(tmp_path, server, compose):
    """``given(**changes of judge)``: a configuration over the small bench, with files."""
    root = tmp_path / "data" / "mt_bench"
    bench.write_lines(root / "question.jsonl", bench.questions(4))
    bench.write_lines(root / "judge_prompts.jsonl", bench.prompts().values())
    bench.write_lines(root / "judgments" / "gpt-4_single.jsonl", published())

    def make(**judge):
        config = compose("judge=open_weight_24gb", "scale.judging.repeats=1", config_name="judge_agreement")
        config["questions"] |= {"root": str(root.parent), "references": None, "reference_source": "questions"}
        config["judge"] |= {"base_url": server.base_url, "max_retries": 0} | judge
        places = {"output": str(tmp_path / "judges"), "checkpoints": str(tmp_path / "locks")}
        return config | places | {"models": None, "progress": False}

    return make


def test_answers_come_out_of_the_prompts_and_their_judgments_are_asked_once(given, server, tmp_path):
    def rates(item, times):
        return bench.says(f"Rating: [[{item[0] + 4}]]")

    server.answer = rates
    first = validate_judge(given() | {"part": 2})
    assert len(server.requests) == 8 and first["agreement"]["items"] == 8 and first["questions"]["count"] == 2
    asked = {body["messages"][1]["content"] for body in server.requests}
    assert asked <= {line["user_prompt"] for line in published()}
    whole = validate_judge(given())
    assert len(server.requests) == 16 and whole["agreement"]["items"] == 16  # the smaller part was not asked again
    x = [line["score"] for line in published()]
    y = [line["question_id"] + 4 for line in published()]
    assert whole["agreement"]["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert whole["agreement"]["models"]["alpha"]["reference"] == {"mean": 5.0, "rank": 1}
    assert whole["agreement"]["models"]["alpha"]["judge"]["rank"] == 1  # shared
    server.answer = lambda item, times: bench.says(f"Rating: [[{item[0] + 2}]]")
    twice = validate_judge(given(repeats=2))
    assert len(server.requests) == 32 and twice["agreement"]["noise"] == pytest.approx(2)
    folder = tmp_path / "judges" / "open_weight_24gb"
    assert read_record(folder / "agreement.json")["agreement"] == twice["agreement"]
    (known,) = read_agreements(tmp_path)
    judge = known["judge"]
    assert agreement_of(judge | {"repeats": 9, "endpoint": "elsewhere"}, [known]) is known
    for other in ({"model": "x"}, {"name": "x"}, {"temperature": 1}, {"max_tokens": None}, {"parsing": "fastchat"}):
        assert agreement_of(judge | other, [known]) is None


def test_a_judge_without_ratings_has_a_record_and_one_without_answers_has_none(given, server, tmp_path):
    server.answer = lambda item, times: (
        bench.fails(500, "down") if item == (1, 1) else bench.says("Fine." if item[0] < 4 else "Rating: [[5]]")
    )
    with pytest.raises(ValueError, match="2 of 16 judgments got no answer, 2 of them with: HTTP 500: down; no record"):
        validate_judge(given())
    assert not (tmp_path / "judges/open_weight_24gb/agreement.json").exists()
    server.answer = lambda item, times: bench.says("A fine answer." if item[0] < 4 else "Rating: [[5]]")
    found = validate_judge(given())
    assert found["agreement"]["unrated"] == 0.75 and found["agreement"]["items"] == 4
    assert found["counts"] == {"items": 16, "judged": 4, "failed": 12, "differing": 0}
    asked = len(server.requests)
    assert asked == 16 + 2  # the two without an answer again; what was said without a rating stays said
    server.answer = lambda item, times: bench.says("Rating: [[5]]")
    assert validate_judge(given())["agreement"] == found["agreement"] and len(server.requests) == asked
    again = validate_judge(given(parsing="fastchat"))["counts"]  # it reads otherwise what it asks for
    assert again["judged"] == 16 and len(server.requests) == asked + 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(), "model beta, question 4, turn 2 was not judged"),
        (lambda found: found[0]["judge"].__setitem__(0, "gpt-5"), "judgments by gpt-4, gpt-5; allowed: by one judge"),
        (lambda found: found[2]["judge"].__setitem__(1, "pair-v2"), "question 2, turn 1: prompt 'pair-v2'; known are"),
        (lambda found: found[0].pop("user_prompt"), "judgment 1 lacks user_prompt"),
        (lambda found: found[3].update(user_prompt="of another question"), "question 2, turn 2: the prompt is not"),
        (lambda found: found.clear(), "judgments by nobody"),
    ],
)
def test_a_file_of_something_else_is_refused(given, tmp_path, change, message):
    found = published()
    change(found)
    bench.write_lines(tmp_path / "data/mt_bench/judgments/gpt-4_single.jsonl", found)
    with pytest.raises(ValueError, match=message):
        validate_judge(given())


def test_other_questions_references_or_models_are_refused(given, tmp_path):
    config, root = given(), tmp_path / "data/mt_bench"
    with pytest.raises(ValueError, match="has no model 'gamma'; it has: alpha, beta"):
        validate_judge(config | {"models": ["alpha", "gamma"]})
    for change in ("turns", "reference"):
        questions = bench.questions(4)
        questions[0][change][0] += "!"
        bench.write_lines(root / "question.jsonl", questions)
        with pytest.raises(ValueError, match="question 1, turn 1: the prompt is not FastChat's single-math-v1"):
            validate_judge(config)


@pytest.mark.skipif(not (REAL / "judgments/gpt-4_single.jsonl").is_file(), reason=f"no {REAL}/judgments")
def test_the_published_judgments_agree_with_themselves(compose):
    group = compose(config_name="judge_agreement")["questions"] | {"root": str(REAL.parent)}
    _, real = read_bench(group)
    found = read_reference(
        REAL / "judgments/gpt-4_single.jsonl", real.questions, real.references, real.prompts,
        ["mamba_0_5_dpo_ep1", "mamba_0_75_dpo_ep3", "mamba_0_875_dpo_ep3"],
    )  # fmt: skip
    judged = {model: lines(model, scores) for model, scores in found.scores.items()}
    same = measure(found.scores, judged, 480)
    assert same["items"] == 480 and (same["difference"], same["unrated"]) == (0, 0)
    assert [same[name] for name in ("spearman", "pearson", "kappa")] == pytest.approx([1, 1, 1])
    means = [one["reference"]["mean"] for one in same["models"].values()]
    assert means == pytest.approx([7.12, 6.58, 6.37], abs=0.005)  # as published
    with pytest.raises(ValueError, match="the prompt is not FastChat's"):
        corrected = load_references(real.questions, REAL / "reference_answer/gpt-4.jsonl", "questions")
        read_reference(REAL / "judgments/gpt-4_single.jsonl", real.questions, corrected, real.prompts)


@pytest.mark.skipif(not (REAL / "judgments/gpt-4_single.jsonl").is_file(), reason=f"no {REAL}/judgments")
@pytest.mark.parametrize(
    "path", sorted((ROOT / "results/judges").glob("*/agreement.json")), ids=lambda p: p.parent.name
)
def test_a_committed_record_is_what_its_judgments_say(path, compose):
    record = read_record(path)
    _, real = read_bench(compose(config_name="judge_agreement")["questions"] | {"root": str(REAL.parent)})
    judged = {
        file.stem: read_items(file) for file in path.parent.glob("*.jsonl") if not file.stem.endswith(".failures")
    }
    reference = read_reference(
        REAL / "judgments/gpt-4_single.jsonl", real.questions, real.references, real.prompts, list(judged)
    )
    found, held = measure(reference.scores, judged, record["counts"]["items"]), record["agreement"]
    assert found.pop("models") == held.pop("models") and found == pytest.approx(held)
    failed = sum(len(read_items(file)) for file in path.parent.glob("*.failures.jsonl"))
    assert failed == record["counts"]["failed"] and failed + record["counts"]["judged"] == record["counts"]["items"]
