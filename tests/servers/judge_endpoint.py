"""A judge on 127.0.0.1 that answers what a test tells it to, faults included, and a small bench to be judged.

The bench has FastChat's formats in this project's words. Each of its answers names its question and turn, so that the
endpoint knows which item a prompt is about.
"""

import json
import re
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SINGLE = (
    "Rate it as [[1]] to [[10]].\n{question}\n"
    "%s[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
)
TALK = (
    "%s<|The Start of Assistant A's Conversation with User|>\n\n"
    "### User:\n{question_1}\n\n### Assistant A:\n{answer_1}\n\n"
    "### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n"
    "<|The End of Assistant A's Conversation with User|>"
)
MARK = re.compile(r"answer (\d+) (first|second)")


def questions(number=8):
    """Every second one of a category that needs references."""
    return [
        {
            "question_id": n,
            "category": "math" if n % 2 else "writing",
            "turns": [f"question {n} {{one}}", f"question {n} ünd two"],
            "reference": [f"reference {n} one", f"reference {n} two"],
        }
        for n in range(1, number + 1)
    ]


def prompts():
    def prompt(name, template, system):
        form = {"type": "single", "output_format": "[[rating]]", "category": "general", "description": ""}
        return {"name": name, "system_prompt": system, "prompt_template": template} | form

    return {
        name: prompt(name, template, system)
        for name, template, system in (
            ("single-v1", SINGLE % "", "You are a helpful assistant."),
            ("single-math-v1", SINGLE % "Reference: {ref_answer_1}\n", "You are a helpful assistant."),
            ("single-v1-multi-turn", TALK % "", "Rate the second answer as [[1]] to [[10]]."),
            (
                "single-math-v1-multi-turn",
                TALK % "Reference: {ref_answer_1}, {ref_answer_2}\n",
                "Rate the second answer.",
            ),
        )
    }


def answers(number=8, model="model"):
    return {
        n: {
            "question_id": n,
            "model_id": model,
            "choices": [{"index": 0, "turns": [f"answer {n} first", f"answer {n} second"]}],
        }
        for n in range(1, number + 1)
    }


def write_lines(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@dataclass(frozen=True)
class Reply:
    """What the endpoint does with a request."""

    status: int = 200
    body: object = None  # bytes as they are, else as JSON
    headers: tuple = ()
    seconds: float = 0.0  # to wait before it
    close: bool = False  # cut the connection instead of answering
    unsent: int = 0  # bytes of the body that are announced and not sent
    drip: float = 0.0  # seconds after each tenth of the body


def says(text, finish_reason="stop", **reply):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Reply(
        body={"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}, **reply
    )


def message(**fields):
    """A completion whose message has other fields than a text as content."""
    return Reply(body={"choices": [{"index": 0, "message": {"role": "assistant", **fields}, "finish_reason": "stop"}]})


def fails(status, message, code=None, **reply):
    return Reply(status, {"error": {"message": message, "type": "e", "code": code, "param": None}}, **reply)


class Endpoint:
    """``with Endpoint(answer) as server``: ``answer(item, times)`` gives the Reply to the request about an item.

    Attributes:
        base_url: for the client.
        answer: may be replaced while the server runs. ``item`` is (question id, turn); ``times`` counts its requests.
        requests: the bodies, in the order of arrival.
        authorization: their headers.
        asked: arrival times by item.
    """

    def __init__(self, answer=lambda item, times: says("Rating: [[7]]")):
        self.answer = answer
        self.requests, self.authorization, self.asked = [], [], defaultdict(list)
        self._lock = threading.Lock()

    def __enter__(self):
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = endpoint.reply(body, self.headers.get("Authorization"))
                time.sleep(reply.seconds)
                self.close_connection = reply.close
                if not reply.close:
                    with suppress(OSError):  # a client that waited long enough has gone
                        self.send(reply)

            def send(self, reply):
                body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in (
                    ("Content-Type", "application/json"),
                    ("Content-Length", str(len(body))),
                    *reply.headers,
                ):
                    self.send_header(name, value)
                self.end_headers()
                step = len(body) // 10 + 1 if reply.drip else len(body) + 1
                for start in range(0, len(body) - reply.unsent, step):
                    self.wfile.write(body[start : min(start + step, len(body) - reply.unsent)])
                    time.sleep(reply.drip)
                self.close_connection = bool(reply.unsent)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that hang up are what some tests are about
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reply(self, body, authorization):
        marks = MARK.findall(body["messages"][-1]["content"])
        item = (int(marks[-1][0]), 1 if marks[-1][1] == "first" else 2) if marks else None
        with self._lock:
            self.requests.append(body)
            self.authorization.append(authorization)
            self.asked[item].append(time.monotonic())
            times = len(self.asked[item])
        return self.answer(item, times)

    def count(self, item):
        return len(self.asked[item])
