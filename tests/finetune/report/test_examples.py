"""The page of Appendix E from answers and judgments on disk."""

import hashlib
import json

import pytest

from finetune.mt_bench.judged import read_judgments
from finetune.report.evidence.experiment import Experiment
from finetune.report.labels import Labels
from finetune.report.page.examples import parts_of as build_parts
from finetune.report.page.examples import read_answers, to_html
from finetune.store.catalog import MethodFacts

QUESTIONS = [
    {"question_id": 84, "category": "writing", "turns": ["Write about <b>rain</b> & snow.", "Second turn 84"]},
    {"question_id": 95, "category": "math", "turns": ["What is 1 + 1?", "Second turn 95"]},
]
METHODS = ["full", "dora", "meprop"]
LABELS = Labels({"full": MethodFacts("full", "Regular FT", "full"), "dora": MethodFacts("dora", "DoRA <i>", "peft")})


def answer_of(method, seed, number):
    return f'Answer of {method} {seed} to {number}: <script>alert("x")</script> & "quotes"'


def run_of(kind, model, method, seed):
    run = {"experiment": "test", "kind": kind, "model": model, "method": method, "task": "mt_bench", "seed": seed}
    return run | {"protocol": "sound", "scale": "smoke", "config_hash": "abc"}


def write(folder, name, record, lines):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text)
    if record["run"]["kind"] == "answers":
        record["answers"] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / f"{name}.json").write_text(json.dumps(record))


def write_answers(root, method, seed, *, model="tiny", numbers=(84, 95), cut=(), refused=(), text=answer_of):
    """As the answers stage leaves them."""
    record = {"run": run_of("answers", model, method, seed), "template": "llama-2", "model": {"title": "Tiny LLaMA"}}
    lines = [
        {
            "question_id": number,
            "choices": [{"index": 0, "turns": [text(method, seed, number), "second answer"]}],
            "config_hash": "abc",
            "cut": [number in cut, False],
            "refused": [number in refused, True],
        }
        for number in numbers
    ]
    write(root / "answers" / model / method, f"{model}-{method}-seed{seed}", record, lines)


def write_judgments(root, method, seed, scores, *, quality=True, text=answer_of):
    """As the judgments stage leaves them; scores: (question, repeat) -> score of the first turn, of three repeats."""
    name = f"tiny-{method}-seed{seed}"
    judge = {"model": "judge<1>", "measures_quality": quality, "temperature": 0, "max_tokens": 64, "repeats": 3}
    record = {"run": run_of("judgments", "tiny", method, seed), "judge": judge, "answers": {"cut": 0, "refused": 0}}
    record |= {"questions": {"file": "question.jsonl", "sha256": "0" * 64, "count": 2}}
    lines = [
        {
            "question_id": number,
            "model": name,
            "judge": ["judge<1>", "single-v1"],
            "judgment": f"Words {repeat} <i>on</i> {method}. Rating: [[{score}]]",
            "score": score,
            "turn": 1,
            "repeat": repeat,
            "answer_sha256": hashlib.sha256(json.dumps([text(method, seed, number)]).encode()).hexdigest(),
            "config_hash": "abc",
        }
        for (number, repeat), score in scores.items()
    ]
    write(root / "judgments" / "tiny" / method, name, record, lines)


def parts_of(root, *, examples=(84, 95), model="tiny"):
    experiment = Experiment("test", "sound", {"llama2_7b": model}, tuple(METHODS), labels=LABELS)
    answers, judgments = read_answers(root / "answers"), read_judgments(root / "judgments")
    return build_parts(experiment, questions=QUESTIONS, examples=examples, answers=answers, judgments=judgments)


def cards(root, number=84):
    """Label -> card under a question."""
    [part] = parts_of(root)
    [question] = [one for one in part["questions"] if one["id"] == number]
    return {card.label: card for card in question["cards"]}


@pytest.fixture
def root(tmp_path):
    for method in METHODS:
        write_answers(tmp_path, method, 1)
        write_judgments(tmp_path, method, 1, {(n, r): s for n in (84, 95) for r, s in enumerate((2, 9, 7))})
    return tmp_path


def test_answers_scores_and_words_of_every_method(root):
    found = cards(root)
    assert [*found] == ["Regular FT", "DoRA <i>", "meprop"]
    card = found["DoRA <i>"]
    assert (card.answer, card.score, card.scores, card.repeats) == (answer_of("dora", 1, 84), 7, (2, 9, 7), 3)
    assert card.words[1] == (2, 9, "Words 1 <i>on</i> dora. Rating: [[9]]") and card.warnings == ()
    [part] = parts_of(root)
    assert part["quality"] and part["facts"] == [
        "Tiny LLaMA (tiny) stands in the place of LLaMa-2 (llama2_7b).",
        "Seeds shown: Regular FT 1, DoRA <i> 1, meprop 1.",
        "Conversation template: llama-2.",
        "Prompts longer than the model's window in all its answers: 0 cut, 6 refused.",
        "Judge: judge<1>, median of 3 repeats.",
    ]


def test_the_page_is_whole_escaped_and_needs_nothing_from_outside(root, whole):
    html = to_html("test <b>", parts_of(root))
    tree = whole(html)
    assert tree.names().count("article") == 2 * len(METHODS) and tree.names().count("details") == 6 * len(METHODS)
    words = "Words 1 <i>on</i> dora. Rating: [[9]]"
    for text in (QUESTIONS[0]["turns"][0], answer_of("dora", 1, 95), words, "DoRA <i>", "Answers: test <b>"):
        assert text in tree.texts, text
    assert "Second turn" not in html and "second answer" not in html and not tree.values("href")


def test_a_second_decoder_is_a_part_of_its_own(root, whole):
    write_answers(root, "full", 5, model="second")
    first, second = parts_of(root)
    assert (first["model"], second["model"]) == ("tiny", "second")
    assert second["facts"][0] == "Tiny LLaMA (second) is a decoder that the paper has not."
    assert [card.answer is None for card in second["questions"][0]["cards"]] == [False, True, True]
    assert len(whole(to_html("test", parts_of(root))).values("id")) == 4


def test_scores_that_measure_no_quality(tmp_path):
    write_answers(tmp_path, "full", 1)
    for quality in (False, True):
        write_judgments(tmp_path, "full", 1, {(84, 0): 5}, quality=quality)
        assert ("not a measure of quality" in to_html("test", parts_of(tmp_path))) is not quality


def test_what_is_missing_is_said(tmp_path):
    write_answers(tmp_path, "full", 1, numbers=(84,))
    write_answers(tmp_path, "dora", 1, text=lambda *_: " ")
    write_judgments(tmp_path, "full", 1, {(84, 0): 5})
    assert (cards(tmp_path)["Regular FT"].scores, cards(tmp_path)["Regular FT"].repeats) == ((5,), 3)
    assert cards(tmp_path, 95)["Regular FT"].why == "this question was not answered"
    assert cards(tmp_path)["DoRA <i>"].score is None and cards(tmp_path)["meprop"].why == "no answers of this method"
    html = to_html("test", parts_of(tmp_path))
    assert all(text in html for text in ("2 of 3 repeats failed", "not judged", "an empty answer"))


def test_cut_and_refused_prompts(tmp_path):
    write_answers(tmp_path, "full", 1, cut=(84,), refused=(95,))
    [cut], [refused] = (cards(tmp_path, number)["Regular FT"].warnings for number in (84, 95))
    assert cut.endswith("was cut.") and refused.endswith("was refused.")
    # Second turns were refused too: the sum is over all answers, the cards show first turns.
    assert "1 cut, 3 refused." in parts_of(tmp_path)[0]["facts"][-2]


def test_judgments_of_another_answer_are_refused(tmp_path):
    write_answers(tmp_path, "full", 1)
    write_judgments(tmp_path, "full", 1, {(84, 0): 5}, text=lambda *_: "an older answer")
    with pytest.raises(ValueError, match="question 84, turn 1 was judged on another answer than there is; run the jud"):
        parts_of(tmp_path)


def test_seed_that_all_methods_have(tmp_path):
    for method, seeds in (("full", (1, 2, 3)), ("dora", (2, 3))):
        for seed in seeds:
            write_answers(tmp_path, method, seed)
    assert parts_of(tmp_path)[0]["facts"][1] == "Seeds shown: Regular FT 2, DoRA <i> 2."
    write_answers(tmp_path, "meprop", 7)
    assert parts_of(tmp_path)[0]["facts"][1] == "Seeds shown: Regular FT 1, DoRA <i> 2, meprop 7."


@pytest.mark.parametrize("old", ['"config_hash": "abc"', "Answer of full", '"question_id": 84'])
def test_answers_that_their_record_was_not_written_for_are_refused(tmp_path, old):
    write_answers(tmp_path, "full", 1)
    path = tmp_path / "answers" / "tiny" / "full" / "tiny-full-seed1.jsonl"
    path.write_text(path.read_text().replace(old, old[:-1] + "5", 1))
    with pytest.raises(ValueError, match=r"full-seed1\.jsonl( is not the file that|, line 1 holds no).*"):
        parts_of(tmp_path)


def test_no_model_and_no_answers(tmp_path):
    for model, fact in ((None, "Nothing ran in the place of LLaMa-2 (llama2_7b)."), ("tiny", "Nothing was judged.")):
        [part] = parts_of(tmp_path, model=model)
        assert part["facts"][-1] == fact
        assert all(card.why == "no answers of this method" for one in part["questions"] for card in one["cards"])


@pytest.mark.parametrize("examples", [(), (84, 159)])
def test_unknown_examples(root, examples):
    with pytest.raises(ValueError, match=r"name at least one question, each of them of \[84, 95\]"):
        parts_of(root, examples=examples)
