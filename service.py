"""The BentoML service: typed endpoints, lifecycle, and the doors that it mounts.

Start it with `sdbento serve` or `bentoml serve`. The engine runs in this process, on its own
thread. The handlers are async; they wait for the engine and never block.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from importlib import import_module

import bentoml
from PIL.Image import Image as PILImage
from starlette.responses import Response

from sdbento.doors.a1111 import generation as a1111_generation
from sdbento.doors.a1111 import options as a1111_options
from sdbento.doors.a1111.failures import ERRORS as A1111_ERRORS
from sdbento.doors.a1111.tools import controlnet, extras, machine, png_info
from sdbento.doors.a1111.tools import listings as a1111_listings
from sdbento.doors.docs import reference
from sdbento.doors.http import listings, ping
from sdbento.doors.http.events import guarded_stream, server_sent_events
from sdbento.doors.http.exposure import warn_if_open
from sdbento.doors.http.failures import guarded
from sdbento.doors.http.guard import Guard, parsed_request
from sdbento.doors.http.labels import RouteLabels
from sdbento.doors.http.routing import mounted
from sdbento.doors.http.typed import REQUEST_MODELS, arguments
from sdbento.doors.openai import api as openai_api
from sdbento.doors.openai import models as openai_models
from sdbento.doors.openai.failures import ERRORS as OPENAI_ERRORS
from sdbento.doors.openai.files import PUBLIC_PREFIX
from sdbento.doors.runpod import api as runpod_api
from sdbento.doors.runpod.lifespan import run_jobs
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter
from sdbento.heavy_imports import without_collector
from sdbento.images.codec import MEDIA_TYPES
from sdbento.jobs.delivery.bucket import Bucket
from sdbento.malloc import keep_freed_memory
from sdbento.request.schema import (
    MAX_TIMEOUT,
    GenerateRequest,
    GenerateResponse,
    ImageRequest,
    MaskedRequest,
)
from sdbento.settings import SettingsError

log = logging.getLogger("sdbento.service")

keep_freed_memory()  # here, while the process that serves still has only one thread


def leave_out_timeouts(module: str = "bentoml._internal.server.http.traffic") -> None:
    """Serve without BentoML's middleware for timeouts, which cannot be turned off (1.4.40).

    It starts a timer for each request, even a health check, that keeps 5 KB of it until the
    timeout, however soon the request is answered: memory grows with the number of requests. The
    engine has its own deadlines. The middleware is a private part of BentoML; where another version
    has none by that name, the server serves with whatever that version does.
    """
    try:
        middleware = import_module(module)
        middleware.TimeoutMiddleware  # noqa: B018  # raises if it is gone
    except (ImportError, AttributeError):
        log.warning("BentoML %s keeps its timeouts: no TimeoutMiddleware", bentoml.__version__)
    else:
        middleware.TimeoutMiddleware = lambda app, **_: app  # type: ignore[attr-defined]


leave_out_timeouts()


def count_by_route(
    labels: RouteLabels, module: str = "bentoml._internal.server.http.instruments"
) -> None:
    """Let BentoML's metrics count by route; see `labels`. This middleware is private as well."""
    try:
        middleware = import_module(module)
        counting = middleware.RunnerTrafficMetricsMiddleware
    except (ImportError, AttributeError):
        log.warning("BentoML %s counts requests by path: no middleware", bentoml.__version__)
    else:
        middleware.RunnerTrafficMetricsMiddleware = labels.around(counting)  # type: ignore[attr-defined]


ERROR_SHAPES = {"/v1/": OPENAI_ERRORS, "/sdapi/": A1111_ERRORS, "/controlnet/": A1111_ERRORS}

# BentoML's own routes are POST only and cannot have parameters in their paths.
DOORS = (
    listings.router,
    ping.router,
    runpod_api.router,
    openai_api.router,
    openai_models.router,
    a1111_generation.router,
    a1111_options.router,
    a1111_listings.router,
    controlnet.router,
    extras.router,
    machine.router,
    png_info.router,
    reference.router,
)
routes = mounted(*DOORS, lifespan=run_jobs, error_shapes=ERROR_SHAPES)
count_by_route(RouteLabels(DOORS, REQUEST_MODELS))


@bentoml.service(
    name="sdbento",
    workers=1,
    http={"host": "127.0.0.1"},  # BentoML's own default is all addresses; `--host` names others
    traffic={"timeout": MAX_TIMEOUT + 60},  # for proxies before the server, such as BentoCloud's
)
@bentoml.asgi_app(routes, path="/")
class StableDiffusion:
    """Text to image with Stable Diffusion 1.5, 2.1 and XL."""

    def __init__(self) -> None:
        # Imported here, because BentoML's supervisor reads this file too and needs no torch.
        with without_collector():
            from sdbento.app import App

        try:
            settings = load_settings()
            logging.getLogger("sdbento").setLevel(settings.log_level)  # App has things to say
            Bucket.configured(settings)  # complains now, not at the first result
            self.app = routes.state.app = App(settings)
            warn_if_open(settings)
            self._health = ping.listen(self.app, settings)
        except SettingsError as error:
            sys.exit(f"sdbento: {error}")
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
    @guarded
    async def generate(self, request: GenerateRequest, /) -> GenerateResponse:
        """Make images; the answer is JSON with base64 images, their seeds and all parameters."""
        return await self.app.generate(request)

    @bentoml.api
    @guarded
    async def txt2img(self, request: GenerateRequest, /) -> PILImage:
        """Make one image; the answer is the image itself."""
        return await self._one_image(request)

    @bentoml.api
    @guarded
    async def img2img(self, request: ImageRequest, /) -> PILImage:
        """Make one image from another, sent as a form's file or in JSON."""
        return await self._one_image(request)

    @bentoml.api
    @guarded
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
        return Response(  # type: ignore[return-value]  # BentoML sends a Response as it is
            await asyncio.to_thread(result.encode),
            media_type=MEDIA_TYPES[request.output_format],
            headers={"X-Seed": str(result.seeds[0])},
        )

    @bentoml.api
    @guarded_stream
    async def generate_stream(self, request: GenerateRequest, /) -> AsyncGenerator[str, None]:
        """Make images and tell of it as server-sent events: queued, step, preview, done, error."""
        async with aclosing(server_sent_events(self.app.stream(request))) as events:
            async for event in events:
                yield event


StableDiffusion.add_asgi_middleware(  # type: ignore[attr-defined]  # it is a Service by now
    Guard,
    load_settings=load_settings,
    request_models=REQUEST_MODELS,
    error_shapes=ERROR_SHAPES,
    open_prefixes=(PUBLIC_PREFIX,),
)

# The Guard has parsed the body. Without this BentoML would parse it again: twice the time on the
# event loop for a body of many megabytes. BentoML's client calls as `arguments` tells it.
for endpoint in StableDiffusion.apis.values():  # type: ignore[attr-defined]
    endpoint.input_spec.from_http_request = parsed_request
    endpoint.input_spec.model_json_schema = partial(arguments, REQUEST_MODELS[endpoint.route])
