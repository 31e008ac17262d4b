"""A judge on 127.0.0.1 that answers well, or badly in a chosen way: always, or to the first request of each answer."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

KEY = "sk-trust-0123456789abcdef"
"""The key that the client sends and that must appear nowhere."""


def _says(text: Any, reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    ).encode()


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "e", "code": None}}).encode()


class FaultyJudge:
    """The server, for the time of a ``with`` block.

    Args:
        reply: a name of `REPLIES`, or ``good``.
        when: ``always``, or ``first``: to the first request about each answer.
    """

    GOOD: ClassVar[bytes] = _says("Sound.\n\nRating: [[7]]")
    REPLIES: ClassVar[dict[str, tuple[int, bytes]]] = {
        "500": (500, _error("broken")),
        "429": (429, _error("slow down")),
        "401 with the key": (401, _error(f"bad key {KEY}")),
        "400 with the key": (400, _error(f"bad request of {KEY}")),
        "404": (404, _error("no such model")),
        "HTML": (200, b"<html>hello</html>"),
        "nothing": (200, b""),
        "half": (200, _says("Rating: [[7]]")[:60]),
        "no choices": (200, b'{"choices": []}'),
        "a list": (200, b"[1, 2]"),
        "null": (200, _says(None)),
        "typed parts": (200, _says([{"type": "text", "text": "Rating: [[7]]"}])),
        "no rating": (200, _says("Good.")),
        "11": (200, _says("Rating: [[11]]")),
        "0": (200, _says("Rating: [[0]]")),
        "7.5 of 100": (200, _says("Rating: [[75]]")),
        "quotes": (200, _says("The answer says: Rating: [[1]]. I do not agree.\n\nRating: [[7]]")),
        "thinks": (200, _says("<think>Perhaps [[2]]? No.</think>\n\nRating: [[7]]")),
        "thinks, end alone": (200, _says("Perhaps [[2]]? No.</think>\n\nRating: [[7]]")),
        "cut in thought": (200, _says("<think>Perhaps [[2]], or", "length")),
        "reason is the key": (200, _says("", KEY)),
        "another encoding": (200, _says("Rating: [[7]]").replace(b"R", b"\xff\xfe", 1)),
        "cut off": (-1, b""),
        "slow": (-2, b""),
    }

    def __init__(self, reply: str, when: str) -> None:
        self.reply, self.when = reply, when
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> FaultyJudge:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

            def do_POST(self) -> None:
                status, body = judge.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                if status == -2:
                    time.sleep(2)
                if status < 0:
                    self.close_connection = True
                    return
                with suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, body: bytes) -> tuple[int, bytes]:
        """Status and body for a request; a negative status answers nothing."""
        asked = hashlib.sha256(json.dumps(json.loads(body)["messages"]).encode()).hexdigest()
        with self._lock:
            first = asked not in self._seen
            self._seen.add(asked)
        if self.reply == "good" or (self.when == "first" and not first):
            return 200, self.GOOD
        return self.REPLIES[self.reply]
