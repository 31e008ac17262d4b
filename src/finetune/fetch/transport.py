"""Connections of this process: loopback without proxy, and what of the environment can't be used, in one line.

The HTTP package is that of huggingface_hub and of openai's client; it is imported where a client is made.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own: 127.0.0.0/8, ::1, 0.0.0.0, ``localhost`` and names below it."""
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def unusable(error: Exception) -> str:
    """Why no client could be made: which variables of the environment name a proxy or certificates in vain.

    Args:
        error: of the client's constructor: OSError, ImportError or ValueError. What the variables hold is not shown.
    """
    names, what = (_CERTIFICATES, "certificates") if isinstance(error, OSError) else (_PROXIES, "proxy")
    found = [name for name in os.environ if name.upper() in names]
    socks = "; a socks proxy needs the package socksio" if isinstance(error, ImportError) else ""
    return (
        f"the {what} that {' or '.join(found) or 'the environment'} names can't be used ({type(error).__name__}): "
        f"unset the variable, or mend it{socks}."
    )


def use_for(endpoints: Collection[str]) -> None:
    """Make huggingface_hub, which has one client a process, connect to loopback addresses directly.

    If all endpoints are of this machine, the environment's proxies and certificates are not looked at.
    """
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook

    def make() -> Any:
        trust = not all(is_loopback(url) for url in endpoints)
        verify = httpx2.create_ssl_context(trust_env=trust)
        hosts = {*_LOOPBACK, *(urlsplit(url).netloc for url in endpoints if is_loopback(url))}
        return httpx2.Client(
            trust_env=trust,
            verify=verify,
            mounts={f"all://{host}": httpx2.HTTPTransport(verify=verify) for host in hosts},
            follow_redirects=True,
            timeout=None,  # each request has its own
            event_hooks={"request": [hf_request_event_hook]},
        )

    set_client_factory(make)


def open_client() -> None:
    """Make huggingface_hub's client, if there is none yet.

    Raises:
        ValueError: if the environment names a proxy or certificates that can't be used.
    """
    from huggingface_hub import get_session

    try:
        get_session()
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(unusable(error)) from None
