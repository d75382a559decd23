"""Checks the `Host` of requests to a server without keys, as protection from DNS rebinding.

The owner of a domain can let its name point at this machine once a visitor has loaded its page. The
visitor's browser then takes this server for a part of that page, which may send and read anything.
The page's requests still name its domain in `Host`. They come without TLS, for which this machine
would need a certificate of that domain.
"""

from __future__ import annotations

import asyncio
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from sdbento.doors.http.exposure import is_exposed
from sdbento.errors import Forbidden
from sdbento.settings import Settings

# Ends of names that nobody can register. Kubernetes' services end in one of them, too.
PRIVATE = (".localhost", ".local", ".internal", ".lan", ".home.arpa")
ANY = "*"
_PORT = re.compile(r":\d*$")
_IPV6 = re.compile(r"\[[^\[\]]*\]")


class Hosts:
    """The names of this server; `check` the one of each request."""

    def __init__(self, settings: Settings) -> None:
        allowed = list(filter(None, settings.allowed_hosts.split(",")))
        own = [socket.gethostname(), urlsplit(settings.public_url or "").hostname or ""]
        # A page of any name may ask anyway where CORS names all.
        self._any = ANY in allowed or ANY in settings.cors_origins.split(",")
        self._names = {*allowed, *map(str.lower, own)}
        self._ends = (*PRIVATE, *(name[1:] for name in allowed if name.startswith("*.")))
        self._only_known = True if allowed else None  # None: it was not asked yet who can reach it

    async def check(self, scope: Scope) -> None:
        """Raises Forbidden for a request that a page of a foreign name may have sent.

        If nobody but this machine can reach the server, or the operator has named hosts, no request
        may have another name. Else proxies and programs, of whose names the server cannot know, may
        ask under any, and only browsers without TLS may not.
        """
        headers = Headers(scope=scope)
        host = _PORT.sub("", headers.get("host", "").lower()).removesuffix(".")
        if self._any or self._is_known(host):
            return
        if self._only_known is None:
            _, port = scope.get("server") or (None, None)
            self._only_known = not await asyncio.to_thread(is_exposed, port)
        if self._only_known or _is_browser_without_tls(headers):
            raise Forbidden(
                f"the server does not accept requests for the host {host[:80]!r}; add it to "
                "SDBENTO_ALLOWED_HOSTS"
            )

    def _is_known(self, name: str) -> bool:
        """Besides names that were given, any that nobody can own: addresses, and names without a
        dot. (No top-level domain is a number.)"""
        if "." not in name or name.rpartition(".")[2].isdecimal() or _IPV6.fullmatch(name):
            return True
        return name in self._names or name.endswith(self._ends)


def _is_browser_without_tls(headers: Headers) -> bool:
    """Whether a page of an http:// address may have sent it, judged by headers that no page can
    change.

    With TLS, browsers send Sec-Fetch-Site, and old ones at least accept `br`; without, neither.
    They always send Accept-Language, as hardly any program does.
    """
    if (origin := headers.get("origin")) is not None:
        return origin.startswith("http://")
    with_tls = "sec-fetch-site" in headers or "br" in headers.get("accept-encoding", "")
    return "accept-language" in headers and not with_tls
