"""GET /, a page to make pictures on. It needs no key, but the requests that it makes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from sdbento.doors.http.routing import door
from sdbento.doors.web.pages import MEDIA_TYPES, Files, page

STATIC = Path(__file__).parent / "static"
PREFIX = "/web/"
FILES = Files(STATIC)
PAGE = (STATIC / "index.html").read_text(encoding="utf-8").replace("VERSION", FILES.version)
PUBLIC_PREFIXES = tuple(f"{PREFIX}{FILES.version}/{folder}" for folder in sorted(FILES.folders()))
OPEN: dict[str, Any] = {"security": []}  # in the OpenAPI document


class _FilePath(PathConvertor):
    """As `path`, but not empty: Starlette would redirect /web to /web/, and the Guard takes that
    slash away again."""

    regex = ".+"


register_url_convertor("file_path", _FilePath())
router = door("Documents")


@router.get("/", response_class=HTMLResponse, openapi_extra=OPEN)
async def web_page() -> Response:
    """A page to make pictures on."""
    return page(PAGE)


@router.get(
    PREFIX + "{file:file_path}",
    response_class=Response,
    openapi_extra=OPEN,
    responses={
        200: {
            "content": {kind: {"schema": {"type": "string"}} for kind in set(MEDIA_TYPES.values())}
        }
    },
)
async def web_file(file: str, request: Request) -> Response:
    """A file of that page, below the version of all of them."""
    version, _, name = file.partition("/")
    return FILES.answer(version, name, request)
