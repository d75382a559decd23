"""GET /docs.json, the OpenAPI document, and GET /docs, a page to read it and to try the routes.

The page is Swagger UI, from this server alone: the browser is told to load nothing from elsewhere.
BentoML has documents of its own at / and /docs.json; the routes of the doors come first. Its page
asks Google Tag Manager, and its document knows only its own routes.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from sdbento.doors.docs.document import document
from sdbento.doors.http.routing import door
from sdbento.doors.web.pages import Files, page, text

FILES = Files(Path(__file__).parent / "static")
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sdbento: reference</title>
<link rel="stylesheet" href="docs/{FILES.version}/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="reference"></div>
<script src="docs/{FILES.version}/swagger-ui-bundle.js"></script>
<script src="docs/{FILES.version}/start.js"></script>
</body>
</html>
"""
TYPES = ("text/css", "text/javascript")

router = door("Documents")


@router.get(
    "/docs.json",
    response_class=Response,
    responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def openapi_document(request: Request) -> Response:
    """This document: OpenAPI 3.1."""
    written = await run_in_threadpool(_document, request.app)
    return text(written, "application/json", request)


@router.get("/docs", response_class=HTMLResponse)
async def reference_page() -> Response:
    """This document as a page, to read and to try."""
    return page(PAGE)


@router.get(
    "/docs/{version}/{name}",
    response_class=Response,
    responses={200: {"content": {kind: {"schema": {"type": "string"}} for kind in TYPES}}},
)
async def reference_file(version: str, name: str, request: Request) -> Response:
    """A file of that page."""
    return FILES.answer(version, name, request)


@lru_cache(maxsize=1)
def _document(app: FastAPI) -> bytes:
    settings = app.state.app.settings
    needs_keys = settings.api_key is not None or settings.api_keys is not None
    return json.dumps(document(app, app.state.error_shapes, needs_keys=needs_keys)).encode()
