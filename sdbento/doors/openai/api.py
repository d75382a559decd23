"""The routes of OpenAI's images API: generations, edits, variations, and the files they name.

Each body becomes a GenerateRequest for App; what differs is told in two headers, X-SDBento-Model
and X-SDBento-Warnings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from sdbento.access.caller import current_caller
from sdbento.doors.docs.bodies import BINARY
from sdbento.doors.http.routing import TheApp, app_of, door, shared
from sdbento.doors.openai import answers, edits, parts
from sdbento.doors.openai.body import ImageBody, VariationBody
from sdbento.doors.openai.files import PUBLIC_PREFIX, Files
from sdbento.doors.openai.order import Order, in_clients_words, to_order
from sdbento.doors.openai.public_url import public_url
from sdbento.doors.openai.stream import Kind, stream
from sdbento.errors import NotFound
from sdbento.images.codec import MEDIA_TYPES
from sdbento.request.parse import explain

if TYPE_CHECKING:
    from sdbento.app import App

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
                "description": "The seed of the first image; streams do not have it",
                "schema": {"type": "integer"},
            },
            "X-SDBento-Warnings": {
                "description": "A JSON list of what is not as the request says",
                "schema": {"type": "string"},
            },
        },
    }
}

_FILE = {"schema": BINARY}


@router.post("/v1/images/generations", responses=_ANSWERS)
async def create_image(body: ImageBody, request: Request, app: TheApp) -> Response:
    """Make images from a prompt, as OpenAI's `images.generate`."""
    with in_clients_words(body):
        order = await to_order(app, body)
        return await _answer(request, app, order, "image_generation")


@router.post("/v1/images/edits", responses=_ANSWERS, openapi_extra=parts.describe(ImageBody))
async def create_edit(request: Request, app: TheApp) -> Response:
    """Change an image, or repaint where its mask is transparent, as OpenAI's `images.edit`.

    The body is a form, or JSON. Of several images the first is edited.
    """
    return await _change(request, app, ImageBody)


@router.post(
    "/v1/images/variations", responses=_ANSWERS, openapi_extra=parts.describe(VariationBody)
)
async def create_variation(request: Request, app: TheApp) -> Response:
    """Make images that resemble one, as OpenAI's `images.create_variation`."""
    return await _change(request, app, VariationBody)


@router.api_route(
    PUBLIC_PREFIX + "{name}",
    methods=["GET", "HEAD"],
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


async def _change(request: Request, app: App, kind: type[ImageBody]) -> Response:
    """The answer of a route whose body is of this `kind`, beside images."""
    sent = await parts.read(request)
    body = _validated(kind, sent.fields)
    with in_clients_words(body):
        order = await edits.with_images(app, await to_order(app, body), sent)
        return await _answer(request, app, order, "image_edit")


async def _answer(request: Request, app: App, order: Order, kind: Kind) -> Response:
    if order.body.stream:
        return await stream(app, order, kind)
    result = await app.run(order.request)
    images = await result.encode_all(app.image_threads)
    urls = _stored(request, app, order, images) if order.wants_urls else None
    return Response(
        await asyncio.to_thread(answers.render, order, result.images[0].size, images, urls),
        media_type="application/json",
        headers=answers.headers(order, result.warnings) | {"X-Seed": str(result.seeds[0])},
    )


def _stored(request: Request, app: App, order: Order, images: Sequence[bytes]) -> list[str]:
    """Keep these files; the URLs where they can be had."""
    names = _files(request).add(images, order.request.output_format, current_caller().owner)
    base = public_url(request, app.settings) + PUBLIC_PREFIX
    return [base + name for name in names]


def _files(request: Request) -> Files:
    """Those of the server, made when they are first needed."""
    settings = app_of(request).settings
    return shared(request, Files, lambda: Files(settings.url_seconds, settings.url_bytes))


def _validated(kind: type[ImageBody], fields: dict[str, Any]) -> ImageBody:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise explain(error) from None
