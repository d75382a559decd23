"""The routes of OpenAI's images API: generations, edits, variations, and the files they name.

Each body becomes a GenerateRequest for App; what differs is told in two headers, X-SDBento-Model
and X-SDBento-Warnings.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from sdbento.access.caller import current_caller
from sdbento.doors.http.routing import TheApp, app_of, door
from sdbento.doors.openai import answers, edits, parts
from sdbento.doors.openai.body import ImageBody, VariationBody
from sdbento.doors.openai.files import PUBLIC_PREFIX, Files
from sdbento.doors.openai.order import Order, in_clients_words, to_order
from sdbento.doors.openai.public_url import public_url
from sdbento.doors.openai.stream import Kind, stream
from sdbento.errors import NotFound
from sdbento.images.codec import MEDIA_TYPES
from sdbento.request.parse import explain
from sdbento.request.schema import GenerateResponse

if TYPE_CHECKING:
    from sdbento.app import App

PREFIX = "/v1/"  # of all paths whose errors have OpenAI's shape

router = door("OpenAI images")

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": answers.ImagesAnswer,
        "description": "The images; with `stream`, events that end in one for each image",
        "content": {"text/event-stream": {}},
        "headers": {
            "X-SDBento-Model": {
                "description": "The model that was used",
                "schema": {"type": "string"},
            },
            "X-Seed": {
                "description": "The seed of the first image",
                "schema": {"type": "string"},
            },
            "X-SDBento-Warnings": {
                "description": "A JSON list of what is not as the request says",
                "schema": {"type": "string"},
            },
        },
    }
}

_FILE = {"schema": parts.FILE}


@router.post("/v1/images/generations", responses=_ANSWERS)
@router.post("/v1/images/generations/", include_in_schema=False)
async def create_image(body: ImageBody, request: Request, app: TheApp) -> Response:
    """Make images from a prompt, as OpenAI's `images.generate`."""
    with in_clients_words(body):
        order = await to_order(app, body)
        return await _answer(request, app, order, "image_generation")


@router.post("/v1/images/edits", responses=_ANSWERS, openapi_extra=parts.describe(ImageBody))
@router.post("/v1/images/edits/", include_in_schema=False)
async def create_edit(request: Request, app: TheApp) -> Response:
    """Change an image, or repaint where its mask is transparent, as OpenAI's `images.edit`.

    The body is a form, or JSON. Of several images the first is edited.
    """
    sent = await parts.read(request)
    body = _validated(ImageBody, sent.fields)
    with in_clients_words(body):
        order = await to_order(app, body)
        inputs = await edits.edit_inputs(app, body, sent.images[0], sent.mask)
        if len(sent.images) > 1:
            order.warnings.append(f"only the first of {len(sent.images)} images was edited")
        return await _answer(request, app, order.with_fields(**inputs), "image_edit")


@router.post(
    "/v1/images/variations", responses=_ANSWERS, openapi_extra=parts.describe(VariationBody)
)
@router.post("/v1/images/variations/", include_in_schema=False)
async def create_variation(request: Request, app: TheApp) -> Response:
    """Make images that resemble one, as OpenAI's `images.create_variation`."""
    sent = await parts.read(request)
    body = _validated(VariationBody, sent.fields)
    with in_clients_words(body):
        order = await to_order(app, body)
        inputs = edits.variation_inputs(body, sent.images[0])
        return await _answer(request, app, order.with_fields(**inputs), "image_edit")


@router.head(PUBLIC_PREFIX + "{name}", include_in_schema=False)
@router.get(
    PUBLIC_PREFIX + "{name}",
    response_class=Response,
    responses={200: {"content": dict.fromkeys(MEDIA_TYPES.values(), _FILE)}},
    openapi_extra={"security": []},
)
async def get_file(name: str, request: Request) -> Response:
    """An image that an answer named by its URL; it needs no key, and is kept for a while."""
    files = _files(request)
    if (file := files.get(name)) is None:
        raise NotFound("there is no such file, or it is not kept any longer")
    return Response(
        file.data,
        media_type=MEDIA_TYPES[file.output_format],
        headers={
            "Cache-Control": f"private, max-age={files.seconds_left(file)}",
            "X-Content-Type-Options": "nosniff",
        },
    )


@router.options("/v1/images/generations", include_in_schema=False)
@router.options("/v1/images/edits", include_in_schema=False)
@router.options("/v1/images/variations", include_in_schema=False)
async def ping() -> Response:
    """Some clients ask in this way whether there is such a server."""
    return Response(status_code=204, headers={"Allow": "POST, OPTIONS"})


@router.options(PUBLIC_PREFIX + "{name}", include_in_schema=False)
async def ping_file() -> Response:
    return Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS"})


async def _answer(request: Request, app: App, order: Order, kind: Kind) -> Response:
    if order.body.stream:
        return await stream(app, order, kind)
    response = await app.generate(order.request)
    urls: Sequence[str] = ()
    if order.wants_urls:
        urls = await _stored(request, app, order, response)
    return Response(
        await asyncio.to_thread(answers.render, order, response, urls),
        media_type="application/json",
        headers=answers.headers(order, response.warnings) | {"X-Seed": str(response.seeds[0])},
    )


async def _stored(
    request: Request, app: App, order: Order, response: GenerateResponse
) -> list[str]:
    """Keep the images of a response; the URLs where they can be had."""
    images = await asyncio.to_thread(lambda: [b64decode(image) for image in response.images])
    names = _files(request).add(images, order.request.output_format, current_caller().name)
    base = public_url(request, app.settings) + PUBLIC_PREFIX
    return [base + name for name in names]


def _files(request: Request) -> Files:
    """Those of the server, made when they are first needed."""
    state, settings = request.app.state, app_of(request).settings
    if not hasattr(state, "openai_files"):
        state.openai_files = Files(settings.url_seconds, settings.url_bytes)
    files: Files = state.openai_files
    return files


def _validated(kind: type[ImageBody], fields: dict[str, Any]) -> ImageBody:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise explain(error) from None
