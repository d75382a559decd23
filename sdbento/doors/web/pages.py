"""Pages that load nothing from elsewhere: what their browser is told, and their files."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from sdbento.errors import NotFound

# Images that a script has made have `blob:` addresses, small ones of a stylesheet `data:`.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
FOR_EVER = "public, max-age=31536000, immutable"
MEDIA_TYPES = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def page(text: str) -> Response:
    """A page for a browser, which asks each time whether it has changed."""
    return HTMLResponse(text, headers=HEADERS | {"Cache-Control": "no-cache"})


class Files:
    """The stylesheets, scripts and drawings below `folder`, and no other file of it.

    Their addresses begin with a version, a digest of them all. So an address has the same file for
    ever, and a browser that has it does not ask again.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in MEDIA_TYPES
        }
        digest = sha256()
        for name, body in self._files.items():
            digest.update(f"{name}\0{sha256(body).hexdigest()}\n".encode())
        self.version = digest.hexdigest()[:16]

    def folders(self) -> set[str]:
        """The folders that hold them, as paths that end in a slash; "" is `folder` itself."""
        return {name[: name.rfind("/") + 1] for name in self._files}

    def answer(self, version: str, name: str, request: Request) -> Response:
        """The file of that name, or 304 if the browser has it. Raises NotFound, also for another
        version, whose files are not here."""
        body = self._files.get(name) if version == self.version else None
        if body is None:
            raise NotFound(f"this page has no file called {name[:80]}")
        headers = HEADERS | {"Cache-Control": FOR_EVER, "ETag": f'"{version}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return text(body, f"{MEDIA_TYPES[Path(name).suffix]}; charset=utf-8", request, headers)


def text(
    body: bytes,
    media_type: str,
    request: Request,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Response:
    """An answer that is the same for all, compressed for clients that take that."""
    headers = {**headers, "Content-Type": media_type, "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        body, headers["Content-Encoding"] = _compressed(body), "gzip"
    return Response(body, headers=headers)


@lru_cache(maxsize=256)
def _compressed(body: bytes) -> bytes:
    return gzip.compress(body)
