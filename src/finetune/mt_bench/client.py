"""One question to a judge model behind an OpenAI-compatible endpoint, and what its failure means.

What concerns one item (a time-out, 429 or 5xx after retries, broken JSON, an empty answer) is an :class:`ItemFailed`;
what every other item would meet too (a refused key, an unknown model, no server) is a :class:`JudgeUnusable`. What the
endpoint sends back reaches nobody but through :meth:`JudgeClient._shown`, which takes the key out.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from finetune.config.check import check
from finetune.config.groups import JudgeEndpoint
from finetune.mt_bench.rating import LAST

SECRET_LENGTH = 8  # a shorter "key" is a word such as EMPTY; taking it out of texts would damage them
QUOTED = 200  # characters of a server's message that are kept
MOST_CHARACTERS = 100_000  # of a judgment
CUT = ("length", "max_tokens", "content_filter")  # finish reasons of an answer that is not whole


class ItemFailed(Exception):
    """One item has no judgment after so many attempts; the others may have. ``said``: words without a rating."""

    def __init__(self, reason: str, attempts: int, said: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.attempts, self.said = attempts, dict(said or {})


class JudgeUnusable(ValueError):
    """No item can be judged until the user changes something."""


@dataclass(frozen=True)
class JudgeOptions:
    """How answers are judged.

    Attributes:
        model: the judge's name at the endpoint.
        base_url: of the endpoint, such as ``http://127.0.0.1:8000/v1``; without user, password or query.
        api_key_env: environment variable that holds the key; None for an endpoint that asks for none.
        temperature: None sends none: some newer models refuse it. FastChat's is 0.
        max_tokens: of a judgment; None sends none. FastChat's is 2048.
        token_parameter: ``max_tokens``, or ``max_completion_tokens`` as newer models call it.
        timeout: seconds for one request.
        max_retries: of a request after a time-out, a broken connection, 408, 409, 429 or 5xx.
        parallel: requests at a time.
        repeats: judgments of each item.
        measures_quality: False for a judge whose scores only show that the pipeline works.
        parsing: which rating of a judgment counts, one of :data:`finetune.mt_bench.rating.PARSINGS`.
        progress: whether a bar over the judgments is shown.
        ask_again: whether what the judge answered without a rating is asked again by a later run; where the judge is
            what is measured, its first answer is what it said.

    Raises:
        ValueError: on a value that :class:`finetune.config.groups.JudgeEndpoint` refuses.
    """

    model: str
    base_url: str
    api_key_env: str | None = None
    temperature: float | None = 0.0
    max_tokens: int | None = 2048
    token_parameter: str = "max_tokens"
    timeout: float = 120.0
    max_retries: int = 5
    parallel: int = 8
    repeats: int = 1
    measures_quality: bool = True
    parsing: str = LAST
    progress: bool = False
    ask_again: bool = True

    def __post_init__(self) -> None:
        check(JudgeEndpoint, {name: getattr(self, name) for name in JudgeEndpoint.model_fields}, "judge")

    def sampling(self) -> dict[str, Any]:
        """What of the options goes into a request beside model and messages."""
        temperature = None if self.temperature is None else float(self.temperature)  # 0 and 0.0 are one configuration
        found = {"temperature": temperature, self.token_parameter: self.max_tokens}
        return {name: value for name, value in found.items() if value is not None}


class JudgeClient:
    """Asks the judge, from several threads if need be; a context manager that closes its connections.

    The key stays inside the ``openai`` client: no attribute, message or repr of this class shows it, and it is taken
    out of what the endpoint sends back. Without a key in ``api_key_env`` it is a ValueError, as are a proxy or
    certificates of the environment that can't be used; an address of this machine asks for neither.
    """

    def __init__(self, options: JudgeOptions) -> None:
        from openai import OpenAI

        from finetune.mt_bench.transport import http_client

        self.options = options
        self._client = OpenAI(
            base_url=options.base_url,
            api_key=read_key(options.api_key_env),
            timeout=options.timeout,
            max_retries=options.max_retries,
            http_client=http_client(options.base_url, options.timeout),
        )
        self._reached = False  # whether the endpoint has ever answered
        self._missed = 0  # items in a row that found no server
        self._unusable: str | None = None
        self._last = threading.local()

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def attempts(self) -> int:
        """Requests that this thread's last answer took."""
        return self._last.attempts

    @property
    def finish_reason(self) -> str | None:
        """Why this thread's last answer ended: ``stop``, or one of ``CUT`` if it is not whole."""
        return self._last.finish_reason

    @property
    def words(self) -> str:
        """This thread's last answer."""
        return self._last.words

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The judge's answer to a conversation; ItemFailed if it got none, JudgeUnusable if no other would."""
        import openai

        if self._unusable is not None:  # found by another thread
            raise JudgeUnusable(self._unusable)
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.options.model, messages=list(messages), **self.options.sampling()
            )
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            found = self._refused(error) if isinstance(error, openai.APIStatusError) else self._unconnected(error)
            if isinstance(found, JudgeUnusable):
                self._unusable = str(found)
            raise found from None
        except UnicodeError:
            raise ItemFailed("the prompt has characters that UTF-8 has not", 1) from None
        self._reached, self._missed = True, 0
        self._last.attempts = 1 + response.retries_taken
        choice = _choice(response.http_response.content, self.attempts)
        reason = choice.get("finish_reason")
        self._last.finish_reason = self._quote(reason) if isinstance(reason, str) else None
        self._last.words = self._content(choice["message"])
        return self.words

    def _content(self, message: Mapping[str, Any]) -> str:
        """What the judge says in a message: its text, and of typed parts those of type text."""
        content, ended = message.get("content"), f"finish_reason {self.finish_reason!r}"
        if self.finish_reason in CUT:
            ended += ": see judge.max_tokens, of which reasoning takes its part"
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, Mapping)]
            texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
            content = "".join(text for text in texts if isinstance(text, str))
        else:
            parts = []
        if content is not None and not isinstance(content, str):
            raise ItemFailed(f"the answer's content is a {type(content).__name__}, not a text", self.attempts)
        if content and content.strip():
            if len(content) > MOST_CHARACTERS:
                raise ItemFailed(f"the judge's answer has {len(content):,} characters ({ended})", self.attempts)
            return self._shown(content)
        if message.get("refusal"):
            raise ItemFailed(f"the judge refuses: {self._quote(message['refusal'])}", self.attempts)
        if parts or message.get("reasoning_content") or message.get("reasoning"):
            raise ItemFailed(
                f"the judge's answer holds no text, only reasoning or other parts ({ended})", self.attempts
            )
        raise ItemFailed(f"the judge's answer is empty ({ended})", self.attempts)

    def _refused(self, error: Any) -> Exception:
        """What an HTTP status means, as an exception to raise."""
        self._reached, self._missed = True, 0
        status, model, url = error.status_code, self.options.model, self.options.base_url
        if status in (401, 403):  # servers quote the key in these: their text is left out
            variable = self.options.api_key_env
            where = f"environment variable {variable}" if variable else "judge.api_key_env"
            return JudgeUnusable(f"{url} refuses access (HTTP {status}): check the key in {where} and what it may use.")
        told = error.body.get("message") if isinstance(error.body, Mapping) else None
        said = self._quote(told or error.response.text or error.message)
        if 300 <= status < 400:
            where = self._quote(error.response.headers.get("Location", "no address"))
            return JudgeUnusable(
                f"{url} sends requests elsewhere (HTTP {status}: {where}): set judge.base_url to the judge's own."
            )
        if status == 404:
            return JudgeUnusable(f"{url} has no judge model {model!r}, or is no such address (HTTP 404: {said}).")
        if status == 402 or error.code == "insufficient_quota":
            return JudgeUnusable(f"{url}: the account has no quota left (HTTP {status}: {said}).")
        if error.code in ("unsupported_parameter", "unsupported_value"):
            return JudgeUnusable(
                f"{model} refuses a parameter (HTTP {status}: {said}): set judge.temperature=null, "
                "judge.max_tokens=null or judge.token_parameter=max_completion_tokens."
            )
        return ItemFailed(f"HTTP {status}: {said}", _attempts(error))

    def _unconnected(self, error: Any) -> Exception:
        """What a connection without an answer means: nobody there, or one request that went wrong."""
        import openai

        cause, attempts = error.__cause__, _attempts(error)
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
            self._missed += 1
            if not self._reached or self._missed > self.options.parallel:
                return JudgeUnusable(
                    f"no judge answers at {self.options.base_url} ({self._quote(str(cause)) or type(cause).__name__}, "
                    f"{attempts} attempts): start it, or set judge.base_url."
                )
            return ItemFailed("no connection", attempts)
        if isinstance(error, openai.APITimeoutError):
            return ItemFailed(f"no answer within {self.options.timeout:g} s", attempts)
        if type(cause).__name__ == "BodyRefused":
            return ItemFailed(f"the answer is refused: {cause}", attempts)
        return ItemFailed(f"connection broken ({type(cause).__name__})", attempts)

    def _quote(self, text: Any) -> str:
        return " ".join(self._shown(str(text)).split())[:QUOTED]

    def _shown(self, text: str) -> str:
        """A text of the endpoint without the key, or any part of it, and without halves of surrogate pairs."""
        return without_key(text.encode(errors="replace").decode(), self._client.api_key)


def without_key(text: str, key: str) -> str:
    """A text in which ``***`` stands for a key and for all parts of it that are ``SECRET_LENGTH`` long or more."""
    lowered, secret, hidden = text.lower(), key.lower(), [False] * len(text)
    if len(lowered) != len(text):  # of some letters the small one is two characters
        lowered, secret = text, key
    for start in range(len(secret) - SECRET_LENGTH + 1):
        part, place = secret[start : start + SECRET_LENGTH], -1
        while (place := lowered.find(part, place + 1)) >= 0:
            hidden[place : place + SECRET_LENGTH] = [True] * SECRET_LENGTH
    runs = groupby(zip(text, hidden, strict=True), key=lambda pair: pair[1])
    return "".join("***" if secret_run else "".join(mark for mark, _ in run) for secret_run, run in runs)


def read_key(variable: str | None) -> str:
    """The key in an environment variable; a placeholder for None. No error shows anything of the value."""
    if variable is None:
        return "none"  # the client wants some key; a local server looks at none
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"environment variable {variable} is not set: put the judge's API key into it.")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"environment variable {variable} holds no API key: it has spaces or characters beyond ASCII.")
    return key


def _choice(body: bytes, attempts: int) -> dict[str, Any]:
    """The first choice of a chat completion, with its message."""
    try:
        choice = json.loads(body)["choices"][0]
        if isinstance(choice["message"], dict) and isinstance(choice, dict):
            return choice
        raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ItemFailed(f"the answer is no chat completion ({type(error).__name__})", attempts) from None


def _attempts(error: Any) -> int:
    """Requests behind an error: the client numbers its retries in a header."""
    try:
        return 1 + int(error.request.headers.get("x-stainless-retry-count", 0))
    except ValueError:
        return 1
