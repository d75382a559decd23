"""Where clients reach this server: what URLs in answers begin with."""

from __future__ import annotations

import re

from starlette.requests import Request

from sdbento.settings import Settings

_HOST = re.compile(r"[\w.\-]+(:\d{1,5})?|\[[0-9a-fA-F:.]+\](:\d{1,5})?", re.ASCII)


def public_url(request: Request, settings: Settings) -> str:
    """Scheme and host as the client named them, unless SDBENTO_PUBLIC_URL says otherwise.

    Without a slash at the end. Headers that proxies add are not read, for any client can send
    them.
    """
    if settings.public_url is not None:
        return settings.public_url
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        host = "{}:{}".format(*request.scope["server"])
    return f"{request.url.scheme}://{host}"
