"""The judge without a model: its rating follows the answer, a wrong prompt gets 400, it speaks the protocol."""

import json
import urllib.error
import urllib.request

import pytest

from finetune.mt_bench.local_judge import NAME, NOTICE, LocalJudge, find_answer, rate

SINGLE = "Question?\n[The Start of Assistant's Answer]\n{}\n[The End of Assistant's Answer]"
TALK = (
    "<|The Start of Reference Answer|>\n\n### User:\nx\n\n### Reference answer:\nr\n\n"
    "<|The End of Reference Answer|>\n\n\n<|The Start of Assistant A's Conversation with User|>\n\n"
    "### User:\nQ1\n\n### Assistant A:\n{}\n\n### User:\nQ2\n\n### Assistant A:\n{}\n\n"
    "<|The End of Assistant A's Conversation with User|>"
)


@pytest.fixture(scope="module")
def server():
    with LocalJudge() as judge:
        yield judge


def ask(server, prompt, path="/chat/completions", **changes):
    body = {"model": NAME, "messages": [{"role": "user", "content": prompt}]} | changes
    request = urllib.request.Request(server.base_url + path, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(response.read())["choices"][0]["message"]["content"]


def refusal(server, *args, **kwargs):
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, *args, **kwargs)
    with caught.value as error:
        return error.code, json.loads(error.read())["error"]["message"]


@pytest.mark.parametrize(
    ("answer", "rating"),
    [("", 1), ("a b c", 1), ("a b c d", 2), ("a A a a a a", 1), (" ".join(map(str, range(99))), 10)],
)
def test_the_rating_counts_distinct_words(server, answer, rating):
    assert rate(answer) == rating
    for prompt in (SINGLE.format(answer), TALK.format("x y z w v u t s r q p", answer)):
        said = ask(server, prompt)
        assert f"[[{rating}]]" in said and NOTICE in said


def test_the_second_answer_is_rated_whatever_the_first():
    assert find_answer(TALK.format("first", "second\n\n### User:\nmore")).strip() == "second\n\n### User:\nmore"
    assert find_answer(SINGLE.format("line\n[[3]]\n")) == "line\n[[3]]\n"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Rate this: good answer",
        "[The Start of Assistant's Answer]\nno end",
        "<|The Start of Assistant A's Conversation with User|>\n\n### User:\nQ\n\n### Assistant A:\none turn\n\n"
        "<|The End of Assistant A's Conversation with User|>",
        TALK.format("a", "b").replace("### Assistant A:", "### Assistant:"),
    ],
)
def test_a_wrong_prompt_gets_400(server, prompt):
    code, message = refusal(server, prompt)
    assert code == 400 and "no answer in the prompt" in message


def test_a_wrong_request_is_refused_as_real_servers_do(server):
    good = SINGLE.format("x")
    assert refusal(server, good, model="gpt-4")[0] == 404
    assert refusal(server, good, path="/completions")[0] == 404
    for messages in ([], None, [{"role": "user", "content": None}]):
        assert refusal(server, good, messages=messages)[0] == 400
