"""Pages that load nothing from elsewhere: what their browser is told, and their files."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

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
        self._static = StaticFiles(directory=folder)
        self._paths = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.suffix in MEDIA_TYPES
        }
        digest = sha256()
        for name, path in sorted(self._paths.items()):
            digest.update(f"{name}\0{sha256(path.read_bytes()).hexdigest()}\n".encode())
        self.version = digest.hexdigest()[:16]

    def folders(self) -> set[str]:
        """The folders that hold them, as paths that end in a slash; "" is `folder` itself."""
        return {name[: name.rfind("/") + 1] for name in self._paths}

    def answer(self, version: str, name: str, request: Request) -> Response:
        """The file of that name, or 304 if the browser has it. Raises NotFound, also for another
        version, whose files are not here."""
        path = self._paths.get(name) if version == self.version else None
        if path is None:
            raise NotFound(f"this page has no file called {name[:80]}")
        answer = self._static.file_response(path, path.stat(), request.scope)
        answer.headers.update(HEADERS | {"Cache-Control": FOR_EVER})
        if answer.status_code == 200:
            answer.headers["Content-Type"] = f"{MEDIA_TYPES[path.suffix]}; charset=utf-8"
        return answer
