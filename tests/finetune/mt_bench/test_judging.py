"""Judging: FastChat's prompts byte for byte, its parsing, and that faults, kills and full disks lose nothing."""

import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import judge_endpoint as bench
import pytest

from finetune.mt_bench.client import JudgeOptions, JudgeUnusable
from finetune.mt_bench.journal import Journal
from finetune.mt_bench.judging import fastchat_asks, judge_answers
from finetune.mt_bench.local_judge import LocalJudge, find_answer
from finetune.mt_bench.questions import load_judge_prompts, load_questions, load_references

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("SPARSEGRAD_DATA", ROOT / "data")) / "mt_bench"
real = pytest.mark.skipif(
    not (REAL / "judgments/gpt-4_single.jsonl").is_file(), reason=f"no {REAL}/judgments: published judgments by GPT-4"
)
ITEMS = [(n, turn) for n in range(1, 9) for turn in (1, 2)]


@pytest.fixture
def judge(server, tmp_path):
    """``judge(answers=..., max_retries=...)``: counts of a run over the small bench; files lie in tmp_path/judged."""

    def run(questions=None, answers=None, prompts=None, **changes):
        questions = questions or bench.questions()
        settings = {"model": "judge", "base_url": server.base_url, "timeout": 5, "max_retries": 1, "parallel": 4}
        counts = judge_answers(
            questions,
            load_references(questions, None, "questions"),
            prompts or bench.prompts(),
            answers or bench.answers(),
            "model",
            tmp_path / "judged",
            JudgeOptions(**settings | changes),
        )
        assert counts.pop("differing") == 0  # the last of the tests on ratings has others
        return counts

    return run


@pytest.fixture
def lines(tmp_path):
    """``lines()``: the judgments on disk; ``lines("model.failures")``, ``lines("earlier/model")``: other files."""

    def read(name="model"):
        text = (tmp_path / "judged" / f"{name}.jsonl").read_text()
        assert text == "" or text.endswith("\n")
        assert text.count('"line_sha256": ') == text.count("\n")
        return [{k: v for k, v in json.loads(line).items() if k != "line_sha256"} for line in text.splitlines()]

    return read


def items_of(lines):
    return [(line["question_id"], line["turn"]) for line in lines]


# ---- prompts ----


def fastchats_messages(questions, references, prompts, answers, folder):
    """What FastChat's own ``play_a_match_single`` sends to its API function, as its main program calls it."""
    from fastchat.llm_judge import common
    from fastchat.llm_judge.gen_judgment import make_judge_single, make_match_single

    bench.write_lines(folder / "judge_prompts.jsonl", prompts.values())
    bench.write_lines(folder / "model_answer/model.jsonl", answers.values())
    held = [{"question_id": number, "choices": found["choices"]} for number, found in references.items()]
    bench.write_lines(folder / "reference_answer/gpt-4.jsonl", held)
    model_answers = common.load_model_answers(str(folder / "model_answer"))
    ref_answers = common.load_model_answers(str(folder / "reference_answer"))
    judges = make_judge_single("gpt-4", common.load_judge_prompts(str(folder / "judge_prompts.jsonl")))
    math = [q for q in questions if q["category"] in common.NEED_REF_CATS]
    default = [q for q in questions if q["category"] not in common.NEED_REF_CATS]
    matches = make_match_single(default, ["model"], model_answers, judges["default"])
    matches += make_match_single(math, ["model"], model_answers, judges["math"], None, ref_answers)
    matches += make_match_single(default, ["model"], model_answers, judges["default-mt"], multi_turn=True)
    matches += make_match_single(math, ["model"], model_answers, judges["math-mt"], None, ref_answers, multi_turn=True)
    caught = []

    def capture(model, conv, temperature, max_tokens):
        caught.append((conv.to_openai_api_messages(), temperature, max_tokens))
        return "[[1]]"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "chat_completion_openai", capture)
        for match in matches:
            common.play_a_match_single(match, None)
    return caught


def canonical(messages):
    return sorted(json.dumps(found, ensure_ascii=False).encode() for found in messages)


def strange(questions):
    """Answers with what formatting and parsing might trip over."""
    found = bench.answers()
    odd = ["{answer} {0} }{", "[[9]] ### Assistant A:\n", "\u2028ü\t\\n\r\n", "", "[The End of Assistant's Answer]"]
    return {
        q["question_id"]: found[1]
        | {
            "question_id": q["question_id"],
            "choices": [
                {"index": 0, "turns": [f"{q['question_id']} {odd[q['question_id'] % 5]} {turn}" for turn in (1, 2)]}
            ],
        }
        for q in questions
    }


def assert_same_messages(server, questions, references, prompts, folder):
    answers = strange(questions)
    expected = fastchats_messages(questions, references, prompts, answers, folder / "fastchat")
    options = JudgeOptions("my-judge", server.base_url, parallel=4)
    counts = judge_answers(questions, references, prompts, answers, "model", folder / "ours", options)
    assert counts["items"] == counts["judged"] == 2 * len(questions) and counts["failed"] == counts["reused"] == 0
    assert canonical(body["messages"] for body in server.requests) == canonical(messages for messages, _, _ in expected)
    assert {(body["temperature"], body["max_tokens"]) for body in server.requests} == {(0.0, 2048)}
    assert {(temperature, limit) for _, temperature, limit in expected} == {(0, 2048)}


def test_the_prompts_are_fastchats(server, tmp_path):
    questions = bench.questions()
    references = load_references(questions, None, "questions")
    assert_same_messages(server, questions, references, bench.prompts(), tmp_path)
    assert len({json.dumps(body) for body in server.requests}) == 16


@real
@pytest.mark.parametrize(("file", "source"), [("mt_bench_inf.jsonl", "questions"), ("question.jsonl", "file")])
def test_the_prompts_of_all_80_questions_are_fastchats(server, tmp_path, file, source):
    questions = load_questions(REAL / file)
    references = load_references(questions, REAL / "reference_answer/gpt-4.jsonl", source)
    prompts = load_judge_prompts(REAL / "judge_prompts.jsonl")
    assert_same_messages(server, questions, references, prompts, tmp_path)
    assert len(server.requests) == 160


@real
def test_real_prompts_and_ratings_of_gpt_4_come_out_again(server, tmp_path):
    """All 480 published judgments: the answers are taken out of the stored prompts, our prompts must equal those, and
    our reading of the stored texts must give the stored scores."""
    stored = [json.loads(line) for line in (REAL / "judgments/gpt-4_single.jsonl").read_text().splitlines()]
    questions = load_questions(REAL / "question.jsonl")
    references = load_references(questions, REAL / "reference_answer/gpt-4.jsonl", "file")
    prompts = load_judge_prompts(REAL / "judge_prompts.jsonl")
    compared = 0
    for model in sorted({row["model"] for row in stored}):
        rows = {(row["question_id"], row["turn"]): row for row in stored if row["model"] == model}
        turns = {key: find_answer(row["user_prompt"]).removesuffix("\n") for key, row in rows.items()}
        answers = {
            q["question_id"]: {"choices": [{"turns": [turns[q["question_id"], turn] for turn in (1, 2)]}]}
            for q in questions
        }
        said = {row["user_prompt"]: bench.says(row["judgment"]) for row in rows.values()}
        server.reply = lambda body, _, said=said: said[body["messages"][-1]["content"]]
        options = JudgeOptions("gpt-4", server.base_url, max_retries=0)
        counts = judge_answers(questions, references, prompts, answers, model, tmp_path, options)
        assert counts["judged"] == 160 and counts["differing"] == 0  # so by FastChat's parsing too
        for line in Journal(
            tmp_path / f"{model}.jsonl", lambda line: (line["question_id"], line["turn"])
        ).items.values():
            row = rows[line["question_id"], line["turn"]]
            for name in ("score", "judge", "user_prompt", "judgment", "model"):
                assert line[name] == row[name]
            compared += 1
    assert compared == 480


def test_fastchat_is_as_before_afterwards():
    from fastchat.llm_judge import common

    names = ("chat_completion_openai", "get_conversation_template", "OPENAI_MODEL_LIST")
    before = [getattr(common, name) for name in names]
    with pytest.raises(RuntimeError), fastchat_asks(lambda messages: "", "my-judge"):
        assert "my-judge" in common.OPENAI_MODEL_LIST
        raise RuntimeError
    assert [getattr(common, name) for name in names] == before


# ---- what is written ----


def test_judgments_have_fastchats_fields_and_ours(judge, lines, server, capsys):
    assert judge(repeats=2) == {"items": 32, "judged": 32, "failed": 0, "reused": 0}
    found = lines()
    assert [(line["question_id"], line["turn"], line["repeat"]) for line in found] == [
        (*item, repeat) for item in ITEMS for repeat in (0, 1)
    ]
    assert set(found[0]) == {
        *("question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"),
        *("repeat", "answer_sha256", "config_hash"),
    }
    assert {(line["turn"], *line["judge"]) for line in found if line["question_id"] == 1} == {
        (1, "judge", "single-math-v1"),
        (2, "judge", "single-math-v1-multi-turn"),
    }
    assert {line["judge"][1] for line in found if line["question_id"] == 2} == {"single-v1", "single-v1-multi-turn"}
    assert lines("model.failures") == [] and capsys.readouterr().out == ""
    assert judge(repeats=2) == {"items": 32, "judged": 32, "failed": 0, "reused": 32}
    assert len(server.requests) == 32


def test_a_changed_answer_is_judged_again_and_replaces_its_judgments(judge, lines, server):
    judge()
    before = dict(zip(ITEMS, lines(), strict=True))
    answers = bench.answers()
    answers[2]["choices"][0]["turns"][1] += " changed"
    answers[3]["choices"][0]["turns"][0] += " changed"
    server.answer = lambda item, times: bench.says("[[2]]")
    again = [(2, 2), (3, 1), (3, 2)]  # the prompt of the second turn holds the first answer
    assert judge(answers=answers) == {"items": 16, "judged": 16, "failed": 0, "reused": 13}
    after = dict(zip(ITEMS, lines(), strict=True))
    assert [item for item in ITEMS if after[item] != before[item]] == again
    assert [after[item]["score"] for item in again] == [2, 2, 2]
    assert items_of(lines("earlier/model")) == again
    asked = len(server.requests)
    assert judge()["reused"] == 16  # the former answers are back: their judgments too
    assert len(server.requests) == asked and lines() == list(before.values())


@pytest.mark.parametrize("change", ["model", "temperature", "prompt", "question", "reference"])
def test_another_configuration_is_judged_anew_and_mixed_with_nothing(judge, lines, server, change):
    judge()
    first = lines()
    questions, prompts, options = bench.questions(), bench.prompts(), {}
    if change == "model":
        options = {"model": "other"}
    elif change == "temperature":
        options = {"temperature": 0.5}
    elif change == "prompt":
        prompts["single-v1"]["prompt_template"] += "!"
    elif change == "question":
        questions[0]["turns"][0] += "!"
    else:
        questions[0]["reference"][0] += "!"
    assert judge(questions=questions, prompts=prompts, **options)["reused"] == 0
    assert len(lines()) == 16 and not {line["config_hash"] for line in lines()} & {
        line["config_hash"] for line in first
    }
    assert lines("earlier/model") == first


def spoil(path, checksum, change):
    """Change the second line of a file of judgments, whose checksum goes if it is not kept."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] = {name: value for name, value in (lines[1] | change).items() if checksum or name != "line_sha256"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"score": 9}, "has score=9, which is not what the judge's words say"),
        ({"score": 11, "judgment": "Rating: [[11]]"}, "score=11; it must be a number from 1 to 10"),
        ({"score": "7"}, "score='7'; it must be a number"),
        ({"score": None}, "score=None"),
        ({"score": -1}, "it has no rating"),
        ({"judgment": None}, "not what the judge's words say"),
        ({"judge": "judge"}, "lacks what a judgment is known by"),
        ({"question_id": [1]}, "name no item"),
        ({"turn": 3}, "name no item"),
    ],
)
def test_a_judgment_that_was_changed_is_judged_anew(judge, lines, server, tmp_path, caplog, checksum, change, why):
    judge()
    before = lines()
    server.answer = lambda item, times: bench.says("[[2]]")
    spoil(tmp_path / "judged/model.jsonl", checksum, change)
    assert judge() == {"items": 16, "judged": 16, "failed": 0, "reused": 15}
    assert lines()[1]["score"] == 2 and [line for line in lines() if line["score"] != 2] == [before[0], *before[2:]]
    assert ("it was changed after it was written" if checksum else why) in caplog.text and len(server.requests) == 17


@pytest.mark.parametrize("name", ["answer_sha256", "config_hash", "model"])
def test_a_judgment_of_something_else_is_judged_anew(judge, lines, server, tmp_path, name):
    judge()
    spoil(tmp_path / "judged/model.jsonl", False, {name: "other"})
    assert judge()["reused"] == 15 and len(server.requests) == 17 and items_of(lines()) == ITEMS


THINKS = "The format is [[9]].\n</think>\nRating: [[3]]"


def test_another_parsing_reads_the_words_again_and_asks_nobody(judge, lines, server, tmp_path):
    def said(item, times):
        return bench.says({1: THINKS, 2: "See [4]."}.get(item[0], "[[5]]"))

    def run(parsing):
        options = JudgeOptions("judge", server.base_url, max_retries=0, parsing=parsing)
        questions = bench.questions()
        references = load_references(questions, None, "questions")
        folder = tmp_path / "judged"
        return judge_answers(questions, references, bench.prompts(), bench.answers(), "model", folder, options)

    server.answer = said
    counts = run("last")
    assert counts == {"items": 16, "judged": 14, "failed": 2, "differing": 4, "reused": 0}
    assert [line["score"] for line in lines()[:2]] == [3, 3]
    assert {line["judgment"] for line in lines("model.failures")} == {"See [4]."}
    asked = len(server.requests)
    assert run("fastchat") == {"items": 16, "judged": 16, "failed": 0, "differing": 4, "reused": 14}
    assert [line["score"] for line in lines()[:4]] == [9, 9, 4, 4] and len(server.requests) == asked + 2
    assert run("last") == {"items": 16, "judged": 14, "failed": 2, "differing": 4, "reused": 14}
    assert [line["score"] for line in lines()[:3]] == [3, 3, 5] and items_of(lines("earlier/model")) == [(2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("words", "reason", "parsing", "score"),
    [
        ("Rating: [[5]]", "length", "last", None),
        ("Rating: [[5]]", "content_filter", "last", None),
        ("<think> as [[5]]", "length", "last", None),
        ("<think> as [[5]]", "length", "fastchat", None),
        ("Rating: [[5]]", "length", "fastchat", 5),  # as FastChat, which does not look
        ("Rating: [[5]]", "stop", "last", 5),
        ("Rating: [[5]]", "eos_token", "last", 5),
    ],
)
def test_a_judgment_that_was_cut_has_no_rating(server, tmp_path, words, reason, parsing, score):
    server.answer = lambda item, times: bench.says(words, finish_reason=reason)
    options = JudgeOptions("judge", server.base_url, max_retries=0, parsing=parsing)
    questions = bench.questions(2)
    references = load_references(questions, None, "questions")
    counts = judge_answers(questions, references, bench.prompts(), bench.answers(2), "model", tmp_path, options)
    assert counts["failed"] == (4 if score is None else 0)
    assert {json.loads(line)["score"] for line in (tmp_path / "model.jsonl").read_text().splitlines()} <= {score}
    for line in (tmp_path / "model.failures.jsonl").read_text().splitlines():
        assert "cut" in json.loads(line)["error"] or "inside its reasoning" in json.loads(line)["error"]


NEWER = {  # as endpoints of reasoning models answer
    (1, 1): bench.message(content="Rating: [[3]]", reasoning_content="At first [[9]]."),
    (1, 2): bench.message(content="Rating: [[4]]", reasoning="Or [[9]]?", refusal=None),
    (2, 1): bench.says("<think>\nThe format is [[9]].\n</think>\n\nRating: [[5]]"),
    (2, 2): bench.says("It could be [[9]].</think>Rating: [[6]]"),  # the opening mark was part of the prompt
    (3, 1): bench.message(content=None, reasoning_content="Rating: [[9]]"),
    (3, 2): bench.says(None, finish_reason="length"),
    (4, 1): bench.says("<think>Rating: [[9]]", finish_reason="length"),
    (4, 2): bench.says("<think>[[9]]</think> Rating: [[7]]"),
}


def test_a_newer_endpoint_is_spoken_to(lines, server, tmp_path):
    server.answer = lambda item, times: NEWER[item]
    asked = {"temperature": None, "max_tokens": 4096, "token_parameter": "max_completion_tokens"}
    options = JudgeOptions("judge", server.base_url, max_retries=0, **asked)
    questions = bench.questions(4)
    references = load_references(questions, None, "questions")
    folder = tmp_path / "judged"
    counts = judge_answers(questions, references, bench.prompts(), bench.answers(4), "model", folder, options)
    assert (counts["judged"], counts["failed"]) == (5, 3) and [line["score"] for line in lines()] == [3, 4, 5, 6, 7]
    errors = {(line["question_id"], line["turn"]): line["error"] for line in lines("model.failures")}
    assert "only reasoning" in errors[3, 1] and "see judge.max_tokens" in errors[3, 2] and "cut" in errors[4, 1]
    assert all({*body} == {"model", "messages", "max_completion_tokens"} for body in server.requests)


def test_where_the_judge_is_and_how_it_is_asked_changes_no_identity(judge, server):
    judge(repeats=2)
    with bench.Endpoint() as other:
        counts = judge(base_url=other.base_url, parallel=1, timeout=9, max_retries=0, temperature=0, repeats=3)
    assert counts == {"items": 48, "judged": 48, "failed": 0, "reused": 32}


def test_missing_answers_are_named(judge):
    with pytest.raises(ValueError, match=r"no answer to questions \[4, 8\]: run the answers stage"):
        judge(answers={n: found for n, found in bench.answers().items() if n not in (4, 8)})


def test_the_local_judge_rates_the_answer_it_was_sent(judge, lines):
    answers = bench.answers()
    answers[1]["choices"][0]["turns"] = ["a b c d", "a b c d e f g h"]
    with LocalJudge() as local:
        assert judge(answers=answers, model="local-judge", base_url=local.base_url)["judged"] == 16
        assert [line["score"] for line in lines()[:3]] == [2, 3, 1]
        prompts = bench.prompts()
        wrong = prompts["single-v1"]["prompt_template"].replace("The Start of Assistant's Answer", "Answer")
        prompts["single-v1"]["prompt_template"] = wrong
        counts = judge(answers=answers, prompts=prompts, model="local-judge", base_url=local.base_url)
    assert counts["failed"] == 4
    assert {line["error"].partition(":")[0] for line in lines("model.failures")} == {"HTTP 400"}


# ---- faults ----

FAULTS = {
    (1, 1): (bench.says("[[5]]", seconds=1.5), "no answer within 0.5 s", 2),
    (2, 1): (bench.fails(500, "boom"), "HTTP 500: boom", 2),
    (3, 1): (
        bench.says("A fine answer.", finish_reason="length"),
        "the judgment was cut (finish_reason 'length': see",
        1,
    ),
    (3, 2): (bench.says("Rating: [[11]]"), "the rating 11 is not from 1 to 10", 1),
    (5, 1): (bench.says("Rating: [[0]]"), "the rating 0 is not from 1 to 10", 1),
    (5, 2): (bench.says("Rating: [[08]]"), "no number as rating", 1),
}
PASSING = {(7, 1): bench.fails(503, "busy")}


def test_faults_lose_nothing_the_rest_is_judged_and_the_next_run_completes(judge, lines, server):
    def faulty(item, times):
        if item in PASSING and times == 1:
            return PASSING[item]
        return FAULTS[item][0] if item in FAULTS else bench.says(f"[[{item[0]}]]")

    server.answer = faulty
    assert judge(timeout=0.5) == {"items": 16, "judged": 10, "failed": 6, "reused": 0}
    assert items_of(lines()) == [item for item in ITEMS if item not in FAULTS]
    failures = {(line["question_id"], line["turn"]): line for line in lines("model.failures")}
    assert list(failures) == list(FAULTS)
    for item, (_, reason, attempts) in FAULTS.items():
        assert reason in failures[item]["error"] and failures[item]["attempts"] == attempts == server.count(item)
        assert failures[item]["repeat"] == 0 and failures[item]["judge"][0] == "judge"
    assert -1 not in [line["score"] for line in lines()]
    asked = {item: server.count(item) for item in ITEMS}
    server.answer = lambda item, times: bench.fails(500, "still") if item == (2, 1) else bench.says(f"[[{item[0]}]]")
    assert judge() == {"items": 16, "judged": 15, "failed": 1, "reused": 10}
    assert items_of(lines("model.failures")) == [(2, 1)]
    server.answer = lambda item, times: bench.says(f"[[{item[0]}]]")
    assert judge() == {"items": 16, "judged": 16, "failed": 0, "reused": 15}
    assert items_of(lines()) == ITEMS and [line["score"] for line in lines()] == [n for n, _ in ITEMS]
    assert lines("model.failures") == []
    assert all(server.count(item) == asked[item] for item in ITEMS if item not in FAULTS)


@pytest.mark.parametrize("reply", [bench.fails(401, "bad key"), bench.fails(404, "no such model")])
def test_what_every_item_would_meet_stops_at_once_and_keeps_what_there_is(judge, lines, server, reply):
    server.answer = lambda item, times: reply if len(server.requests) > 6 else bench.says("[[5]]")
    with pytest.raises(JudgeUnusable, match="HTTP 40[14]"):
        judge(parallel=2)
    assert len(lines()) == 6 and len(server.requests) <= 8 and lines("model.failures") == []
    server.answer = lambda item, times: bench.says("[[5]]")
    assert judge()["reused"] == 6
    assert items_of(lines()) == ITEMS


def test_a_full_disk_stops_with_whole_lines_and_the_next_run_goes_on(judge, lines, monkeypatch):
    append = Journal.append

    def full(journal, line):
        if len(journal.items) == 5:
            raise ValueError("No space left on device")
        append(journal, line)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(ValueError, match="No space left on device"):
            judge()
    kept = lines()
    assert len(kept) == 5
    assert judge() == {"items": 16, "judged": 16, "failed": 0, "reused": 5}
    assert items_of(lines()) == ITEMS and all(line in lines() for line in kept)


@pytest.fixture
def interruptible():
    """Ctrl-C is an exception, even where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_whole_lines_and_what_was_under_way(interruptible, judge, lines, server):
    def interrupting(item, times):
        if len(server.requests) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return bench.says("[[5]]", seconds=0.1)

    assert threading.current_thread() is threading.main_thread()
    server.answer = interrupting
    with pytest.raises(KeyboardInterrupt):
        judge(parallel=2)
    asked = len(server.requests)
    assert 6 <= asked < 16 and len(lines()) == asked
    server.answer = lambda item, times: bench.says("[[5]]")
    assert judge()["reused"] == asked
    assert items_of(lines()) == ITEMS and Counter(map(server.count, ITEMS)) == {1: 16}
