"""Who may pass the Guard: a request brings a key, unless the server has none or the path is open.

No page of another host may make its visitor's browser send one that changes anything; `hosts` finds
those whose name leads here.

Looks at the path and the headers only, so that nobody's body is read before he is known.
"""

from __future__ import annotations

from ipaddress import ip_network

from starlette.datastructures import Headers
from starlette.types import Scope

from sdbento.access.addresses import client_address
from sdbento.access.caller import Caller
from sdbento.access.credentials import presented
from sdbento.access.keyring import Keyring
from sdbento.access.limits import RequestRate
from sdbento.doors.http.hosts import Hosts
from sdbento.errors import Forbidden
from sdbento.settings import Settings

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing
# What load balancers and orchestrators ask. Compared with the whole path, as routes are, so that no
# other spelling of another path can pass for one of them.
OPEN_PATHS = ("/livez", "/readyz", "/ping")
PAGE = "/"  # asks its user for a key when it needs one


class Gate:
    """`admit` each request. Below `open_prefixes` lie files whose names nobody can guess, and those
    of the page at /, which hold no secrets."""

    def __init__(self, settings: Settings, open_prefixes: tuple[str, ...] = ()) -> None:
        """Raises SettingsError if the file of keys cannot be read."""
        self._keyring = Keyring(settings)
        self._rate = RequestRate()
        self._open_paths = {*OPEN_PATHS, PAGE}
        self._open_paths |= {"/metrics"} if settings.metrics_public else set()
        self._open_prefixes = open_prefixes
        any_host = self._keyring.required and not settings.allowed_hosts
        self._hosts = None if any_host else Hosts(settings)
        self._proxies = tuple(map(ip_network, filter(None, settings.trusted_proxies.split(","))))
        self._origins = tuple(filter(None, settings.cors_origins.split(",")))

    async def admit(self, scope: Scope) -> Caller:
        """Who sends the request. Raises Forbidden, Unauthorized, LimitReached, Overloaded."""
        if self._hosts is not None and scope["path"] not in OPEN_PATHS:
            await self._hosts.check(scope)
        if scope["method"] not in SAFE_METHODS:
            _refuse_foreign_page(Headers(scope=scope), self._origins)
        if not self._keyring.required or self.is_open(scope):
            return Caller(address=self._address_of(scope))
        credentials = presented(scope["headers"])
        caller = await self._keyring.identify(credentials, self._address_of(scope))
        self._rate.count(caller)
        return caller

    def _address_of(self, scope: Scope) -> str | None:
        peer = scope.get("client") or (None,)
        forwarded = Headers(scope=scope).getlist("x-forwarded-for")
        return client_address(peer[0], forwarded, self._proxies)

    def is_open(self, scope: Scope) -> bool:
        """OPTIONS is open as well: browsers send it without a key, and it does nothing."""
        method, path = scope["method"], scope["path"]
        if method == "OPTIONS":
            return True
        if method not in ("GET", "HEAD"):
            return False
        return path in self._open_paths or any(
            path.startswith(prefix) and "/" not in path.removeprefix(prefix)
            for prefix in self._open_prefixes
        )


def _refuse_foreign_page(headers: Headers, origins: tuple[str, ...]) -> None:
    """Raises Forbidden for what a page of another host makes its visitor's browser send, with the
    password that the browser remembers (Basic), unless `origins` has that page's.

    CORS does not keep it back: a form or a text may be sent without asking, and bodies are JSON
    whatever their type. Other kinds of keys are never sent without asking. Programs that are no
    browsers send none of these headers. Source: CrossOriginProtection of Go's net/http.
    """
    if _is_own_page(headers) or (origin := headers.get("origin")) in origins:
        return
    scheme = headers.get("authorization", "").partition(" ")[0].lower()
    if scheme == "bearer" or "x-api-key" in headers or ("*" in origins and scheme != "basic"):
        return
    raise Forbidden(
        f"a page of {origin or 'another host'} may not ask for this: SDBENTO_CORS_ORIGINS does not "
        "name it, and it sends no key of its own"
    )


def _is_own_page(headers: Headers) -> bool:
    """Whether a page of this server sends it, or no page at all. Old browsers, and all where there
    is no TLS, tell only the Origin."""
    if (site := headers.get("sec-fetch-site")) is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")
