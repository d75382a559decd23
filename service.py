"""The BentoML service: typed endpoints, lifecycle, and the doors it mounts.

Start it with `bentoml serve` (or `sdbento serve`). The engine lives in this process, on a thread of
its own; the handlers only wait for it. They are async and never block.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing

import bentoml
from bentoml._internal.server.http import traffic
from PIL.Image import Image as PILImage
from starlette.applications import Starlette
from starlette.responses import Response

from sdbento.doors.http import listings, ping
from sdbento.doors.http.guard import Guard, reported, reported_stream, server_sent_events
from sdbento.doors.runpod import api
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter
from sdbento.heavy_imports import without_collector
from sdbento.images.codec import MEDIA_TYPES
from sdbento.malloc import keep_freed_memory
from sdbento.request.schema import (
    MAX_TIMEOUT,
    GenerateRequest,
    GenerateResponse,
    ImageRequest,
    MaskedRequest,
)
from sdbento.settings import SettingsError

keep_freed_memory()  # here, where the process that serves has one thread yet

# The engine has deadlines of its own. BentoML's (1.4.40) keeps 5 KB of every request, of a health
# check too, until its time has passed, however soon it was answered; and it cannot be turned off.
traffic.TimeoutMiddleware = lambda app, timeout: app

# BentoML's own routes are POST only and cannot have parameters in their paths.
routes = Starlette(
    routes=[*listings.create().routes, *ping.ROUTES, *api.ROUTES],
    lifespan=api.lifespan,
)


@bentoml.service(
    name="sdbento",
    workers=1,
    traffic={"timeout": MAX_TIMEOUT + 60},  # for what is before the server, as BentoCloud
)
@bentoml.asgi_app(routes, path="/")
class StableDiffusion:
    """Text to image with Stable Diffusion 1.5, 2.1 and XL."""

    def __init__(self) -> None:
        with without_collector():  # not before: the supervisor reads this file too, without torch
            from sdbento.app import App

        try:
            settings = load_settings()
            self.app = routes.state.app = App(settings)
            self._health = ping.listen(self.app, settings)
        except SettingsError as error:
            sys.exit(f"sdbento: {error}")
        logging.getLogger("sdbento").setLevel(settings.log_level)
        self.app.start()

    @bentoml.on_shutdown
    def close(self) -> None:
        self.app.close()
        if self._health is not None:
            self._health.close()

    async def __is_ready__(self) -> bool:
        return self.app.ready

    async def __is_alive__(self) -> bool:
        return self.app.alive

    @bentoml.api
    @reported
    async def generate(self, request: GenerateRequest, /) -> GenerateResponse:
        """Make images; the answer is JSON with base64 images, their seeds and all parameters."""
        return await self.app.generate(request)

    @bentoml.api
    @reported
    async def txt2img(self, request: GenerateRequest, /) -> PILImage:
        """Make one image; the answer is the image itself."""
        return await self._one_image(request)

    @bentoml.api
    @reported
    async def img2img(self, request: ImageRequest, /) -> PILImage:
        """Make one image from another, sent as a form's file or in JSON."""
        return await self._one_image(request)

    @bentoml.api
    @reported
    async def inpaint(self, request: MaskedRequest, /) -> PILImage:
        """Repaint what is white in `mask_image`; files of a form, or JSON."""
        return await self._one_image(request)

    async def _one_image(self, request: GenerateRequest) -> PILImage:
        if request.num_images != 1:
            raise InvalidParameter(
                f"num_images must be 1 where the answer is one image; given: {request.num_images}. "
                "Use /generate for more",
                param="num_images",
            )
        result = await self.app.run(request)
        return Response(  # type: ignore[return-value]  # sent as it is, parameters embedded
            result.encode(),
            media_type=MEDIA_TYPES[request.output_format],
            headers={"X-Seed": str(result.seeds[0])},
        )

    @bentoml.api
    @reported_stream
    async def generate_stream(self, request: GenerateRequest, /) -> AsyncGenerator[str, None]:
        """Make images and tell of it as server-sent events: queued, step, preview, done, error."""
        async with aclosing(server_sent_events(self.app.stream(request))) as events:
            async for event in events:
                yield event


StableDiffusion.add_asgi_middleware(  # type: ignore[attr-defined]  # it is a Service by now
    Guard,
    load_settings=load_settings,
    request_models={
        "/generate": GenerateRequest,
        "/generate_stream": GenerateRequest,
        "/txt2img": GenerateRequest,
        "/img2img": ImageRequest,
        "/inpaint": MaskedRequest,
    },
)
