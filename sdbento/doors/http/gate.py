"""Who may pass the Guard: a request brings a key, unless the server has none or the path is open.

Looks at the path and the headers only, so that nobody's body is read before he is known.
"""

from __future__ import annotations

from starlette.types import Scope

from sdbento.access.caller import ANYBODY, Caller
from sdbento.access.credentials import presented
from sdbento.access.keyring import Keyring
from sdbento.access.limits import RequestRate
from sdbento.settings import Settings

# What load balancers and orchestrators ask. Compared with the whole path, as routes are, so that no
# other spelling of another path can pass for one of them.
OPEN_PATHS = ("/livez", "/readyz", "/ping")


class Gate:
    """`admit` each request. Below `open_prefixes` lie files whose names nobody can guess."""

    def __init__(self, settings: Settings, open_prefixes: tuple[str, ...] = ()) -> None:
        """Raises SettingsError if the file of keys cannot be read."""
        self._keyring = Keyring(settings)
        self._rate = RequestRate()
        self._open_paths = {*OPEN_PATHS, *(["/metrics"] if settings.metrics_public else [])}
        self._open_prefixes = open_prefixes

    async def admit(self, scope: Scope) -> Caller:
        """Who sends the request. Raises Unauthorized, LimitReached, Overloaded."""
        if not self._keyring.required or self._is_open(scope["method"], scope["path"]):
            return ANYBODY
        caller = await self._keyring.identify(presented(scope["headers"]))
        self._rate.count(caller)
        return caller

    def _is_open(self, method: str, path: str) -> bool:
        """OPTIONS is open as well: browsers send it without a key, and it does nothing."""
        if method == "OPTIONS":
            return True
        if method not in ("GET", "HEAD"):
            return False
        return path in self._open_paths or any(
            path.startswith(prefix) and "/" not in path.removeprefix(prefix)
            for prefix in self._open_prefixes
        )
