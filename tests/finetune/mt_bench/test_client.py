"""The judge's client: what it sends, what each fault means, and that its key is seen nowhere."""

import dataclasses
import email.utils
import gzip
import logging
import socket
import time
import traceback

import judge_endpoint as bench
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.fetch.transport import is_loopback
from finetune.mt_bench import transport
from finetune.mt_bench.client import ItemFailed, JudgeClient, JudgeOptions, JudgeUnusable, without_key

KEY = "sk-test-0123456789abcdefghij"
MESSAGES = [{"role": "system", "content": "be fair"}, {"role": "user", "content": "rate [[?]] answer 1 first"}]


def options(server, **changes):
    return JudgeOptions(**{"model": "judge", "base_url": server.base_url, "timeout": 5, "max_retries": 2} | changes)


def ask(server, **changes):
    with JudgeClient(options(server, **changes)) as client:
        return client.complete(MESSAGES)


def test_the_request_holds_model_messages_and_sampling(server):
    assert ask(server) == "Rating: [[7]]"
    assert server.requests == [{"model": "judge", "messages": MESSAGES, "temperature": 0.0, "max_tokens": 2048}]
    ask(server, temperature=None, max_tokens=None)
    assert server.requests[1] == {"model": "judge", "messages": MESSAGES}
    ask(server, temperature=0.5, max_tokens=9, token_parameter="max_completion_tokens")
    assert server.requests[2] == {
        "model": "judge",
        "messages": MESSAGES,
        "temperature": 0.5,
        "max_completion_tokens": 9,
    }


def test_the_key_comes_from_its_variable_and_a_local_endpoint_gets_a_placeholder(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    ask(server)
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    ask(server, api_key_env="JUDGE_KEY")
    assert server.authorization == ["Bearer none", f"Bearer {KEY}"]


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_missing_key_names_its_variable(server, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY is not set"):
        JudgeClient(options(server, api_key_env="JUDGE_KEY"))


@pytest.mark.parametrize("value", [f"{KEY} {KEY}", f"{KEY}\nX: y", f"{KEY}é"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(server, monkeypatch, value):
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="JUDGE_KEY holds no API key") as caught:
        JudgeClient(options(server, api_key_env="JUDGE_KEY"))
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "reply",
    [
        bench.says(f"your key is {KEY}. [[3]]"),
        bench.fails(401, f"Incorrect API key provided: {KEY[:12]}***{KEY[-4:]}"),
        bench.fails(403, f"{KEY} may not"),
        bench.fails(400, "x" * 190 + KEY),
        bench.fails(404, f"no model for {KEY}"),
        bench.fails(500, f"Bearer {KEY}"),
        bench.Reply(502, f"<html>{KEY}</html>".encode()),
        bench.Reply(body=f"broken {KEY}".encode()),
        bench.fails(400, f"Incorrect key: {KEY[:12]}...{KEY[-9:]}"),
        bench.fails(418, KEY.upper()),
        bench.fails(400, {"key": [KEY]}),
        bench.Reply(307, b"", (("Location", f"http://127.0.0.1:9/{KEY}"),)),
        bench.says(None, finish_reason=f"stop {KEY}"),
        bench.says("[[3]]", finish_reason=f"key {KEY}"),
        bench.says(None, finish_reason={"key": KEY}),
        bench.message(content=None, refusal=f"not with {KEY}"),
        bench.message(content=[{"type": "text", "text": f"Your key is {KEY}. [[3]]"}]),
    ],
)
def test_the_key_is_in_no_text_whatever_the_endpoint_sends_back(server, monkeypatch, caplog, reply):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.answer = lambda item, times: reply
    with JudgeClient(options(server, api_key_env="JUDGE_KEY", max_retries=0)) as client:
        try:
            seen = client.complete(MESSAGES)
        except (ItemFailed, JudgeUnusable) as error:
            seen = "".join(traceback.format_exception(error)) + repr(error) + str(vars(error))
        seen += str(getattr(client._last, "finish_reason", None))
        seen += repr(client) + str(vars(client)) + repr(client.options) + str(dataclasses.asdict(client.options))
    assert server.authorization == [f"Bearer {KEY}"]
    assert KEY not in seen and KEY[:12] not in seen and KEY[-9:] not in seen and KEY.upper() not in seen
    assert KEY not in "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("finetune"))


@pytest.mark.parametrize(
    ("reply", "message", "attempts"),
    [
        (bench.fails(500, "boom"), "HTTP 500: boom", 3),
        (bench.fails(429, "slow down"), "HTTP 429: slow down", 3),
        (bench.Reply(503, b"<html>\n down</html>"), "HTTP 503: .*down", 3),
        (bench.fails(400, "context length exceeded"), "HTTP 400: context length exceeded", 1),
        (bench.Reply(close=True), "connection broken", 3),
        (bench.says("late", seconds=1), "no answer within 0.3 s", 3),
        *(
            (bench.Reply(body=body), "no chat completion", 1)
            for body in (b'{"choices": [{"mess', b"\xff\xfe", b"", [1], {"choices": []}, {"choices": None})
        ),
        *((bench.Reply(body={"choices": [choice]}), "no chat", 1) for choice in ("text", {"message": None})),
        *((bench.says(text), "empty .finish_reason 'stop'", 1) for text in (None, " \n", [], [1])),
        (bench.says(None, finish_reason="x" * 999), r"empty .finish_reason 'x{200}'\)$", 1),
        (bench.says(None, finish_reason=[1, {}]), "empty .finish_reason None", 1),
        (bench.says("", finish_reason="length"), "empty .finish_reason 'length': see judge.max_tokens", 1),
        *((bench.says(text), "content is a (dict|int|bool), not a text", 1) for text in ({"text": "[[5]]"}, 5, True)),
        (bench.message(content=None, refusal="I\nwill not"), "the judge refuses: I will not", 1),
        (bench.message(content="", reasoning_content="[[5]]"), "holds no text, only reasoning or other parts", 1),
        (bench.message(content=[{"type": "thinking", "text": "[[5]]"}]), "no text, only reasoning or other parts", 1),
        (bench.says("[[5]]" * 30_000), "answer has 150,000 characters", 1),
        (bench.Reply(body=b"[" * 200_000), "no chat completion .RecursionError", 1),
        (bench.Reply(body=b'{"choices": [{"message": {"content": "[[5]]"}}]}', unsent=9), "connection broken", 3),
        (bench.says("[[5]]", drip=0.05), "no answer within 0.3 s", 3),
        (bench.Reply(200, b"x" * 2_000_000), "a body of more than 1,000,000 bytes", 3),
        (bench.Reply(200, gzip.compress(b" " * 2_000_000), (("Content-Encoding", "gzip"),)), "a packed body", 3),
        (bench.Reply(429, b"wait", (("Retry-After", "9999"),)), "HTTP 429: wait", 1),
        (bench.Reply(503, b"wait", (("Retry-After", "nonsense"),)), "HTTP 503: wait", 3),
    ],
)
def test_a_fault_of_one_item_is_that_items_with_its_number_of_requests(server, monkeypatch, reply, message, attempts):
    monkeypatch.setattr(transport, "MOST_BYTES", 1_000_000)
    server.answer = lambda item, times: reply
    with pytest.raises(ItemFailed, match=message) as caught:
        ask(server, timeout=0.3)
    assert caught.value.attempts == attempts == len(server.requests)


def test_a_passing_fault_is_retried_and_a_retry_after_is_kept(server):
    server.answer = lambda item, times: (
        bench.fails(429, "wait", headers=(("Retry-After", "1"),)) if times == 1 else bench.says("[[4]]")
    )
    with JudgeClient(options(server)) as client:
        assert client.complete(MESSAGES) == "[[4]]"
        assert client.attempts == 2 and client.finish_reason == "stop"
    first, second = server.asked[1, 1]
    assert second - first >= 1


def test_a_retry_after_that_is_a_date_is_kept(server):
    until = int(time.time()) + 2
    limited = bench.fails(429, "wait", headers=(("Retry-After", email.utils.formatdate(until, usegmt=True)),))
    server.answer = lambda item, times: limited if times == 1 else bench.says(f"{time.time() >= until}")
    assert ask(server) == "True" and len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (bench.fails(401, "x"), "refuses access .HTTP 401.: check the key in environment variable JUDGE_KEY"),
        (bench.fails(403, "x"), "refuses access .HTTP 403."),
        (bench.fails(404, "The model does not exist"), "no judge model 'judge'.*The model does not exist"),
        (bench.fails(429, "quota", code="insufficient_quota"), "no quota left"),
        (bench.fails(402, "pay"), "no quota left"),
        (bench.fails(400, "use max_completion_tokens", code="unsupported_parameter"), "judge.token_parameter="),
        (bench.fails(400, "temperature 0", code="unsupported_value"), "judge.temperature=null"),
        (bench.Reply(302, b"", (("Location", "/login"),)), r"sends requests elsewhere .HTTP 302: /login.: set"),
    ],
)
def test_what_every_item_would_meet_stops(server, monkeypatch, reply, message):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.answer = lambda item, times: reply
    with pytest.raises(JudgeUnusable, match=message):
        ask(server, api_key_env="JUDGE_KEY", max_retries=0)


def test_no_request_follows_a_redirect(server):
    with bench.Endpoint() as other:
        server.answer = lambda item, times: bench.Reply(308, b"", (("Location", f"{other.base_url}/chat/completions"),))
        with pytest.raises(JudgeUnusable, match="HTTP 308"):
            ask(server)
    assert not other.requests


TEXT = [{"type": "text", "text": "Rating: "}, {"type": "thinking", "text": "[[9]]"}, {"type": "text", "text": "[[2]]"}]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (bench.message(content=TEXT), "Rating: [[2]]"),
        (bench.message(content="[[2]]", reasoning_content="[[9]]"), "[[2]]"),
        (bench.Reply(body=b'{"choices": [{"message": {"content": "\\ud800 [[2]]"}}]}'), "? [[2]]"),
    ],
)
def test_what_the_judge_says_is_its_text(server, reply, words):
    server.answer = lambda item, times: reply
    assert ask(server) == words and words.encode()


NOWHERE = "http://127.0.0.1:9"
ENVIRONMENT = [
    *({name: NOWHERE} for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY")),
    *({"ALL_PROXY": value} for value in ("socks5h://127.0.0.1:9", "nonsense")),
    *({name: "/nonexistent/cacert.pem"} for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")),
]


@pytest.fixture
def clear(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", *(next(iter(one)) for one in ENVIRONMENT[-3:])):
        for variant in (name, name.lower()):
            monkeypatch.delenv(variant, raising=False)
    return monkeypatch


@pytest.mark.parametrize("environment", ENVIRONMENT, ids=str)
def test_a_judge_on_this_machine_needs_no_proxy_and_no_certificates(server, clear, environment):
    for name, value in environment.items():
        clear.setenv(name, value)
    for host in ("127.0.0.1", "localhost"):
        assert ask(server, base_url=server.base_url.replace("127.0.0.1", host)) == "Rating: [[7]]"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SSL_CERT_FILE", "/nonexistent/secret.pem", "the certificates that SSL_CERT_FILE names can't be used"),
        ("ALL_PROXY", "socks5h://user:secret@127.0.0.1:9", "proxy that ALL_PROXY names .*ImportError.*package socksio"),
        ("https_proxy", "ftp://user:secret@127.0.0.1:9", "the proxy that https_proxy names can't be used"),
    ],
)
def test_an_environment_that_no_other_address_can_be_reached_with_is_named(clear, name, value, message):
    clear.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught:
        JudgeClient(JudgeOptions("judge", "https://judge.example/v1"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        *((f"http://{host}:8/v1", True) for host in ("127.0.0.1", "127.9.9.9", "[::1]", "localhost", "a.localhost.")),
        *((f"http://{host}:8/v1", True) for host in ("0.0.0.0", "[::ffff:127.0.0.1]", "LOCALHOST")),
        *((f"http://{host}:8/v1", False) for host in ("10.0.0.1", "localhost.example", "127.0.0.1.de", "[fe80::1]")),
    ],
)
def test_loopback(url, local):
    assert is_loopback(url) is local


@given(st.text("sk-0123456789abcdefghij [", max_size=60), st.integers(0, 14), st.integers(8, 28))
def test_no_part_of_a_key_that_tells_it_is_left(text, start, length):
    shown = without_key(text + KEY[start : start + length] + text, KEY)
    assert not any(KEY[place : place + 8] in shown for place in range(len(KEY) - 7))
    assert without_key("a word [[5]]", KEY) == "a word [[5]]" and without_key("EMPTY key", "EMPTY") == "EMPTY key"


def test_no_server_stops_after_the_retries():
    with socket.socket() as holder:  # bound, not listening: nobody else can take the port
        holder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{holder.getsockname()[1]}/v1"
        with (
            JudgeClient(JudgeOptions("judge", url, max_retries=1)) as client,
            pytest.raises(JudgeUnusable, match=rf"no judge answers at {url} \(.*refused.*, 2 attempts\): start it"),
        ):
            client.complete(MESSAGES)


def test_a_server_that_goes_away_later_fails_items_and_stops_when_it_stays_away():
    hangs_up = bench.says("[[5]]", headers=(("Connection", "close"),))
    with bench.Endpoint(lambda item, times: hangs_up) as server:
        client = JudgeClient(options(server, max_retries=0, parallel=2))
        client.complete(MESSAGES)
    with client:
        for _ in range(2):
            with pytest.raises(ItemFailed, match="no connection"):
                client.complete(MESSAGES)
        with pytest.raises(JudgeUnusable, match="no judge answers"):
            client.complete(MESSAGES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "judge.model=''"),
        *(
            ({"base_url": url}, r"judge.base_url=.not shown.; allowed: .*without user, password, query or fragment")
            for url in (
                *("127.0.0.1:8000", "ftp://host/v1", f"https://user:{KEY}@host/v1", f"user:{KEY}@host/v1"),
                *(f"https://host/v1?api-key={KEY}", f"https://host/v1#{KEY}", f"https://{KEY}@host"),
            )
        ),
        ({"base_url": None}, "judge.base_url=.not shown."),
        *(
            ({"api_key_env": name}, r"judge.api_key_env=.not shown.; allowed: the name of an environment variable")
            for name in (
                KEY,
                KEY.replace("-", "_"),
                "hf_QwErTyUiOpAsDfGh",
                "AKIAIOSFODNN7EXAMPLE",
                "",
                "0123456789ABCDEF",
            )
        ),
        ({"temperature": -1}, "judge.temperature=-1"),
        ({"temperature": "0"}, "judge.temperature='0'"),
        ({"max_tokens": 0}, "judge.max_tokens=0"),
        (
            {"token_parameter": "tokens"},
            "judge.token_parameter='tokens'; allowed: 'max_tokens' or",
        ),
        ({"parsing": "first"}, "judge.parsing='first'; allowed: 'last' or 'fastchat'"),
        ({"timeout": 0}, "judge.timeout=0"),
        ({"timeout": float("inf")}, "judge.timeout=inf"),
        ({"max_retries": -1}, "judge.max_retries=-1"),
        ({"parallel": 0}, "judge.parallel=0"),
        ({"repeats": 1.5}, "judge.repeats=1.5"),
        ({"repeats": True}, "judge.repeats=True"),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        JudgeOptions(**{"model": "judge", "base_url": "http://127.0.0.1:8000/v1"} | changes)
    assert KEY not in str(caught.value) and "QwErTy" not in str(caught.value) and "AKIA" not in str(caught.value)
