"""HTTP for the judge: loopback without proxy, bodies bounded in size and time, no redirects, the environment checked.

It imports the ``openai`` client's HTTP package, so it is itself imported where a request is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx2

from finetune.fetch.transport import is_loopback, unusable

MOST_BYTES = 8 * 2**20
"""Of a body; a judgment of 2,048 tokens has some 10 kB."""


class BodyRefused(httpx2.RemoteProtocolError):
    """A body that is too long, or packed although that was not asked for."""


class _Bounded(httpx2.SyncByteStream):
    """A body that ends in an error at the deadline (the client's time-out is for each read alone) or when too long."""

    def __init__(self, response: httpx2.Response, seconds: float) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        self._stream, self._seconds = response.stream, seconds
        self._packed = response.headers.get("Content-Encoding", "identity") != "identity"

    def __iter__(self) -> Iterator[bytes]:
        if self._packed:  # a few bytes can unpack to more than there is memory
            raise BodyRefused("a packed body")
        deadline, size = time.monotonic() + self._seconds, 0
        for part in self._stream:
            size += len(part)
            if size > MOST_BYTES:
                raise BodyRefused(f"a body of more than {MOST_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise httpx2.ReadTimeout("the body took too long")
            yield part

    def close(self) -> None:
        self._stream.close()


def http_client(url: str, seconds: float) -> httpx2.Client:
    """A client for one endpoint.

    A loopback address needs no proxy, and over http no certificates: the environment's are not looked at.

    Args:
        url: of the endpoint.
        seconds: for connecting, for each write and read, and for a whole body.

    Raises:
        ValueError: if a variable of the environment names a proxy or certificates that can't be used; the message
            names the variables, not what they hold.
    """

    def bound(response: httpx2.Response) -> None:
        response.stream = _Bounded(response, seconds)

    local = is_loopback(url)
    try:
        return httpx2.Client(
            trust_env=not local,
            verify=httpx2.create_ssl_context(trust_env=not local or url.startswith("https")),
            timeout=seconds,
            limits=httpx2.Limits(max_connections=None),
            follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [bound]},
        )
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"judge.base_url={url}: {unusable(error)}") from None
