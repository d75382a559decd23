"""The BentoML service: typed endpoints, lifecycle, and the doors that it mounts.

Start it with `sdbento serve` or `bentoml serve`. The engine runs in this process, on its own
thread. The handlers are async; they wait for the engine and never block.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import NoReturn

import bentoml
from PIL.Image import Image as PILImage
from starlette.responses import Response

from sdbento.doors.bentoml.arguments import REQUEST_MODELS, arguments
from sdbento.doors.bentoml.labels import RouteLabels
from sdbento.doors.bentoml.private import (
    bound_connections,
    count_by_route,
    format_logs,
    keep_addresses,
    keep_metrics_in_memory,
    leave_out_timeouts,
    share_tracer,
    trace_by_route,
)
from sdbento.doors.default_model import NOTICE, with_default_model
from sdbento.doors.every import ERROR_SHAPES, IMAGE_ROUTES, OPEN_PREFIXES, ROUTERS
from sdbento.doors.http import ping
from sdbento.doors.http.events import guarded_stream, server_sent_events
from sdbento.doors.http.exposure import decide_any_model, warn_if_open
from sdbento.doors.http.failures import guarded
from sdbento.doors.http.guard import Guard, parsed_request
from sdbento.doors.http.routing import body_readers, mounted
from sdbento.doors.network.limits import Limits
from sdbento.doors.network.log_lines import write_one_line_each
from sdbento.doors.observability.request_log import RequestLog
from sdbento.doors.observability.tracing import tracing
from sdbento.doors.runpod.lifespan import run_jobs
from sdbento.environment import load_log_format, load_settings, note_supervisor, supervisor
from sdbento.errors import InvalidParameter
from sdbento.images.codec import MEDIA_TYPES
from sdbento.jobs.delivery.bucket import Bucket
from sdbento.metrics.exposition import expose_metrics
from sdbento.process.heavy_imports import without_collector
from sdbento.process.malloc import keep_freed_memory
from sdbento.process.parent import end_with_parent
from sdbento.process.replacement import end_process
from sdbento.request.schema import (
    MAX_TIMEOUT,
    GenerateRequest,
    GenerateResponse,
    ImageRequest,
    MaskedRequest,
)
from sdbento.settings import SettingsError
from sdbento.telemetry.log_format import formatter, log_what_python_prints, use_everywhere

LOG_FORMATTER = formatter(LOG_FORMAT := load_log_format())
ROUTES = RouteLabels(ROUTERS, REQUEST_MODELS)


def prepare_process() -> None:
    """What has to be so before BentoML makes the server, in its supervisor or in the process that
    serves: both read this file."""
    keep_freed_memory()  # while there is only one thread
    if bentoml.server_context.worker_index is None:
        note_supervisor()  # for the process that it starts
    else:
        end_with_parent(supervisor())  # else it would keep the port and the folder of the jobs
    write_one_line_each()  # clients could forge lines of the log
    format_logs(LOG_FORMATTER)
    if LOG_FORMAT == "json":
        log_what_python_prints()
    bound_connections(Limits())  # uvicorn waits for slow clients without end
    leave_out_timeouts()  # BentoML's own keep memory for each request
    keep_metrics_in_memory()  # a full disk would kill the process
    keep_addresses()  # uvicorn believes whatever address a program on this machine names
    trace_by_route(ROUTES)
    count_by_route(ROUTES)  # else by each path that was asked for
    expose_metrics()


def refuse_to_start(error: SettingsError) -> NoReturn:
    if LOG_FORMAT == "json":
        logging.getLogger("sdbento").critical("%s", error)
        sys.exit(1)
    sys.exit(f"sdbento: {error}")


prepare_process()

# BentoML's own routes are POST only and cannot have parameters in their paths.
routes = mounted(*ROUTERS, lifespan=run_jobs, error_shapes=ERROR_SHAPES)


@bentoml.service(
    name="sdbento",
    workers=1,
    resources={"gpu": 1, "gpu_type": "nvidia-l4"},  # what BentoCloud gives it
    http={"host": "127.0.0.1"},  # BentoML's own default is all addresses; `--host` names others
    # For what stands before the server, such as BentoCloud: when to give up, when to add a server.
    traffic={"timeout": MAX_TIMEOUT + 60, "concurrency": 8},
    tracing=tracing(),
    logging={"access": {"enabled": False}},  # RequestLog writes one
)
@bentoml.asgi_app(routes, path="/")
class StableDiffusion:
    """Text to image with Stable Diffusion 1.5, 2.1 and XL."""

    def __init__(self) -> None:
        # Imported here, because BentoML's supervisor reads this file too and needs no torch.
        with without_collector():
            from sdbento.app import App
        share_tracer()
        use_everywhere(LOG_FORMATTER)  # what that has imported brings loggers of its own

        try:
            given = load_settings()
            settings = with_default_model(given)
            logging.getLogger("sdbento").setLevel(settings.log_level)  # App has things to say
            if settings is not given:
                logging.getLogger("sdbento").info(NOTICE)
            Bucket.configured(settings)  # complains now, not at the first result
            self.app = routes.state.app = App(decide_any_model(settings), on_broken=end_process)
            warn_if_open(settings)
            self._health = ping.listen(self.app, settings)
        except SettingsError as error:
            refuse_to_start(error)
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
        (image,) = await result.encode_all(self.app.image_threads)
        return Response(  # type: ignore[return-value]  # BentoML sends a Response as it is
            image,
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
    RequestLog,
    labels=ROUTES,
    load_settings=load_settings,
    image_routes=(*REQUEST_MODELS, *IMAGE_ROUTES),
)
StableDiffusion.add_asgi_middleware(  # type: ignore[attr-defined]
    Guard,
    load_settings=load_settings,
    request_models=REQUEST_MODELS,
    error_shapes=ERROR_SHAPES,
    open_prefixes=OPEN_PREFIXES,
    takes_body=body_readers(ROUTERS, REQUEST_MODELS),
)

# The Guard has parsed the body. Without this BentoML would parse it again: twice the time on the
# event loop for a body of many megabytes. BentoML's client calls as `arguments` tells it.
for endpoint in StableDiffusion.apis.values():  # type: ignore[attr-defined]
    endpoint.input_spec.from_http_request = parsed_request
    endpoint.input_spec.model_json_schema = partial(arguments, REQUEST_MODELS[endpoint.route])
