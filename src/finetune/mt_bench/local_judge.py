"""A judge on this machine that needs no model: it speaks the HTTP protocol and rates by a rule. No measure of quality.

The rule: it looks for the answer inside the prompt that it was sent (of two turns the second answer), counts the
distinct words ``d`` of the answer (runs of letters, digits and underscores, in lower case), and rates
``min(10, 1 + d // 4)``. The rating depends on the answer, and on nothing else. A prompt without an answer in FastChat's
format gets HTTP 400.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "local-judge"
WORDS_PER_POINT = 4
NOTICE = "not a measure of quality"

# FastChat's prompts single-v1 and single-math-v1, and the -multi-turn ones.
SINGLE = re.compile(r"\[The Start of Assistant's Answer\]\n(.*)\n\[The End of Assistant's Answer\]", re.DOTALL)
TALK = "Assistant A's Conversation with User"
CONVERSATION = re.compile(rf"<\|The Start of {TALK}\|>\n(.*)\n<\|The End of {TALK}\|>", re.DOTALL)
SPEAKER = re.compile(r"^### Assistant A:\n", re.MULTILINE)


def find_answer(prompt: str) -> str:
    """The answer that a judge prompt asks to rate.

    Raises:
        ValueError: if there is none in FastChat's format.
    """
    single = SINGLE.search(prompt)
    if single is not None:
        return single.group(1)
    conversation = CONVERSATION.search(prompt)
    parts = SPEAKER.split(conversation.group(1), maxsplit=2) if conversation is not None else []
    if len(parts) != 3:
        raise ValueError("no answer in the prompt: needed is one in the marks of FastChat's judge prompts")
    return parts[2]


def rate(answer: str) -> int:
    """1 to 10, from the number of distinct words."""
    return min(10, 1 + len(set(re.findall(r"\w+", answer.lower()))) // WORDS_PER_POINT)


class LocalJudge:
    """The judge behind an OpenAI-compatible server on 127.0.0.1, for the time of a ``with`` block.

    It answers ``POST /v1/chat/completions``.

    Attributes:
        base_url: for the client; set inside the block.
    """

    def __enter__(self) -> LocalJudge:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing; the default writes a line to standard error."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = json.loads(body)
            text = judgment(find_answer(request["messages"][-1]["content"]))
        except (ValueError, LookupError, TypeError) as error:
            self._error(400, str(error))
            return
        if self.path != "/v1/chat/completions":
            self._error(404, f"no such address: {self.path}")
        elif request.get("model") != NAME:
            self._error(404, f"the model {request.get('model')!r} does not exist; this server has {NAME!r}")
        else:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            completion = {"id": "chatcmpl-local", "object": "chat.completion", "created": int(time.time())}
            self._send(200, completion | {"model": NAME, "choices": [choice]})

    def _error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": None}})

    def _send(self, status: int, content: Mapping[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def judgment(answer: str) -> str:
    """The text of a judgment, with its rating as FastChat reads it."""
    return (
        f"This judge counts distinct words; its rating is {NOTICE}. "
        f"The answer has {len(answer)} characters.\n\nRating: [[{rate(answer)}]]"
    )
