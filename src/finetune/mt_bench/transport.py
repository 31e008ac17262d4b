"""HTTP for the judge: loopback without proxy, bodies bounded in size and time, no redirects, the environment checked.

It imports the ``openai`` client's HTTP package, so it is itself imported where a request is made.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import httpx2

MOST_BYTES = 8 * 2**20
"""Of a body; a judgment of 2,048 tokens has some 10 kB."""

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


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


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own: 127.0.0.0/8, ::1, 0.0.0.0, ``localhost`` and names below it."""
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


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
        names = _CERTIFICATES if isinstance(error, OSError) else _PROXIES
        found = [name for name in os.environ if name.upper() in names]
        what = "certificates" if isinstance(error, OSError) else "proxy"
        socks = "; a socks proxy needs the package socksio" if isinstance(error, ImportError) else ""
        raise ValueError(
            f"judge.base_url={url}: the {what} that {' or '.join(found) or 'the environment'} names can't be used "
            f"({type(error).__name__}): unset the variable, or mend it{socks}."
        ) from None
