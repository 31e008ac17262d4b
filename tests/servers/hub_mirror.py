"""A hub on 127.0.0.1 that speaks as much of huggingface.co's protocol as fetching needs, and can misbehave on demand.

Like the real one it keeps parquet and safetensors files in "LFS": those are listed with a sha256 and served by a
redirect to another origin, the rest is listed with a git blob id and served in place. Below `/raw` it serves files as
raw.githubusercontent.com does.
"""

import contextlib
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ROUTES = (
    ("info", re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>\w+)")),
    ("resolve", re.compile(r"(/(?P<kind>datasets))?/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>\w+)/(?P<path>.+)")),
    ("raw", re.compile(r"/(?P<kind>raw)/(?P<name>[^/]+/[^/]+)/(?P<revision>[\w.-]+)/(?P<path>.+)")),
    ("cdn", re.compile(r"/cdn/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<path>.+)")),
)


def blob_id(body: bytes) -> str:
    """Git's id of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass
class Repo:
    """A repository at one commit.

    `tampered` is served in place of what is listed, `listing` overrides fields of the listing, and `cuts` ends the
    connection after so many bytes, once per entry: `(bytes, how)`, how being "close", "reset" or "stall". A repository
    that is not `resumable` sends whole files only.
    """

    revision: str
    files: dict[str, bytes]
    token: str | None = None
    tampered: dict[str, bytes] = field(default_factory=dict)
    listing: dict[str, dict] = field(default_factory=dict)
    cuts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    resumable: bool = True


class HubMirror(ThreadingHTTPServer):
    """Serves `repos`, `(kind, "owner/name") -> Repo`; `bodies` logs `(path, first byte, sent)`.

    `canned` answers a path with a status, headers and a body, whatever the repositories hold.

    A kind is "models" or "datasets" of the hub, or "raw".
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.bodies: list[tuple[str, int, int]] = []
        self.requests: list[str] = []
        self.leaked_tokens: list[str] = []
        self.faults: list[BaseException] = []
        self.canned: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.released = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.raw_endpoint = f"{self.endpoint}/raw"

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()
        assert not self.faults, self.faults

    def handle_error(self, request, client_address):
        """Keeps quiet about connections that end in mid-file, which is on purpose."""
        if not isinstance(sys.exception(), OSError):
            self.faults.append(sys.exception())


class Handler(BaseHTTPRequestHandler):
    server: HubMirror

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path in self.server.canned:
            return self.reply(*self.server.canned[path])
        for route, pattern in ROUTES:
            if match := pattern.fullmatch(path):
                keys = match.groupdict()
                repo = self.server.repos.get((keys["kind"] or "models", keys["name"]))
                if repo is None:
                    return self.reply(404, {"X-Error-Code": "RepoNotFound"})
                if route != "cdn" and keys["revision"] != repo.revision:
                    return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
                return getattr(self, route)(repo, **keys)
        return self.reply(404)

    def info(self, repo: Repo, kind: str, **keys):
        siblings = []
        for path, body in repo.files.items():
            entry = {"rfilename": path, "size": len(body), "blobId": blob_id(body)}
            if path.endswith((".parquet", ".safetensors")):
                entry["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
            siblings.append(entry | repo.listing.get(path, {}))
        gated = "manual" if repo.token else False
        answer = {"id": keys["name"], "sha": repo.revision, "gated": gated, "tags": [], "siblings": siblings}
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def resolve(self, repo: Repo, kind: str | None, path: str, **keys):
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo.token and sent != repo.token:
            return self.reply(403 if sent else 401, {"X-Error-Code": "GatedRepo"})
        if path not in repo.files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        body = repo.files[path]
        commit = {"X-Repo-Commit": repo.revision}
        if not path.endswith((".parquet", ".safetensors")):
            return self.body(repo, path, {**commit, "ETag": f'"{blob_id(body)}"'})
        linked = {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        # "localhost" is another origin than 127.0.0.1: the client must not send its token there.
        place = f"http://localhost:{self.server.server_port}/cdn/{kind or 'models'}/{keys['name']}/{path}"
        self.reply(302, {**commit, **linked, "Location": place})

    def raw(self, repo: Repo, path: str, **keys):
        if "Authorization" in self.headers:
            self.server.leaked_tokens.append(self.headers["Authorization"])
        if path not in repo.files:
            return self.reply(404)
        self.body(repo, path, {})

    def cdn(self, repo: Repo, path: str, **keys):
        if "Authorization" in self.headers:
            self.server.leaked_tokens.append(self.headers["Authorization"])
        self.body(repo, path, {})

    def body(self, repo: Repo, path: str, headers: dict[str, str]):
        content = repo.tampered.get(path, repo.files[path])
        start = int(m[1]) if (m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        start = start if repo.resumable else 0
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        limit, how = repo.cuts[path].pop(0) if self.command == "GET" and repo.cuts.get(path) else (None, "")
        sent = content[start : None if limit is None else start + limit]
        if self.command == "GET":
            self.server.bodies.append((path, start, len(sent)))
        self.reply(206 if start else 200, {**headers, "Accept-Ranges": "bytes"}, sent, len(content) - start)
        if how == "stall":
            self.wfile.flush()
            self.server.released.wait(60)
        elif how == "reset":
            self.wfile.flush()
            time.sleep(0.3)  # a reset discards what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", length: int | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
