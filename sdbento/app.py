"""`App.generate(request)`: the one way in for every door. Wires everything, once.

    admit -> settle -> gather pictures -> lease models -> assemble -> engine -> encode

Knows nothing of HTTP; doors know nothing of what is below.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from PIL import Image

from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.engine.calibration import Calibration
from sdbento.engine.loop import Engine, Event, Handle, Queued
from sdbento.engine.planner import ROWS_PER_IMAGE, Planner
from sdbento.engine.runner import TorchRunner
from sdbento.errors import (
    DeadlineExceeded,
    InvalidParameter,
    Overloaded,
    classify,
    reraise,
)
from sdbento.images import codec
from sdbento.malloc import release_freed_memory
from sdbento.metrics import queue_depth
from sdbento.models.cache import PipelineCache
from sdbento.models.leases import Lease, give_up
from sdbento.request.build import Assembler, Job
from sdbento.request.resolved import Order
from sdbento.request.schema import GenerateRequest, GenerateResponse, Timings, describe
from sdbento.request.settle import (
    Pictures,
    draw_controls,
    fix_size,
    gather,
    has_urls,
    needs_pictures,
    settle,
)
from sdbento.samplers.names import list_samplers
from sdbento.settings import Settings, unknown_variables
from sdbento.threads import compute_only_on, num_cores

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

HUB_LOOKUPS = 4  # names that may be looked up at once
READERS = 16  # requests whose pictures may be fetched at once; hosts may be slow
FIRST_RETRY = 5.0  # seconds until the default model is tried again; doubled each time, up to
LAST_RETRY = 60.0
IDLE = 60.0  # seconds without a request after which freed memory goes back to the kernel
NOT_PARAMETERS = {"output_format", "preview_every", "timeout", "num_images"}


@dataclass(frozen=True)
class Result:
    """What a request came to: its pictures and how they were made."""

    request: GenerateRequest  # settled: everything decided
    images: list[Image.Image]
    timings: Timings
    warnings: list[str]

    @property
    def seeds(self) -> list[int]:
        assert self.request.seed is not None
        return [self.request.seed + i for i in range(len(self.images))]

    def parameters(self, image: int = 0) -> dict[str, Any]:
        """What makes picture `image` again when sent as a request, but for pictures sent along,
        of which it has the digests."""
        asked = describe(self.request)
        chosen = {name: value for name, value in asked.items() if name not in NOT_PARAMETERS}
        return chosen | {"seed": self.seeds[image]}

    def encode(self, image: int = 0) -> bytes:
        """Picture `image` as a file, with its parameters embedded."""
        return codec.encode(self.images[image], self.request.output_format, self.parameters(image))


class App:
    """Everything behind the doors. Make it, `start` it, ask it, `close` it.

    Requests are counted on the event loop that serves them; everything else is thread-safe.
    `runner` None: the real one.
    """

    def __init__(self, settings: Settings, runner: TorchRunner | None = None) -> None:
        self.settings = settings
        self.catalog = Catalog(settings)
        self.pipelines = PipelineCache(settings)
        self.planner = Planner(settings.max_batch_size)
        self.runner = runner or TorchRunner()
        self.engine = Engine(self.runner, self.planner)
        self._assembler = Assembler(settings)
        self._lookups = ThreadPoolExecutor(HUB_LOOKUPS, thread_name_prefix="sdbento-lookup")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sdbento-reader")
        self._num_requests = 0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._default_loaded = threading.Event()
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the engine, and begin to load the default model in the background.

        From here on torch computes with one thread everywhere else in this process.
        """
        for variable in unknown_variables():
            log.warning("%s is set, but no setting has that name", variable)
        num_threads = self.settings.num_threads or num_cores()
        self.engine.start()
        compute_only_on(self.engine.call, num_threads)
        threading.Thread(target=self._load_default, name="sdbento-start", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether the default model has been loaded and the engine runs."""
        return self.engine.alive and self._default_loaded.is_set()

    def close(self, grace: float = 30.0) -> None:
        """Finish what is under way for up to `grace` seconds, refuse the rest, free everything."""
        self._closed.set()
        self.engine.close(grace)
        self.pipelines.close()
        for threads in (self._lookups, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)

    def list_models(self) -> list[dict[str, Any]]:
        loaded = {name for name, *_ in self.pipelines.loaded()}
        return [
            {
                "name": spec.name,
                "family": spec.family,
                "width": spec.width,
                "height": spec.height,
                "num_inference_steps": spec.num_inference_steps,
                "guidance_scale": spec.guidance_scale,
                "scheduler": spec.sampler,
                "memory_gb": spec.memory_gb,
                "inpaints": spec.inpaints,
                "refines": spec.refines,
                "loaded": spec.name in loaded,
                "default": self.settings.sd_model in (spec.name, *spec.aliases),
            }
            for spec in self.catalog.list()
        ]

    def list_samplers(self) -> list[dict[str, Any]]:
        return [vars(sampler) for sampler in list_samplers()]

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Make the images of `request`. Raises errors of the `errors` tree only."""
        return await _respond(await self.run(request))

    async def run(self, request: GenerateRequest) -> Result:
        """As `generate`, but the pictures come as they are. Cancelling this stops the work."""
        with self._admitted():
            arrived = time.monotonic()
            handle, job = await self._submit(await self._settle(request, arrived))
            await handle.wait()
            return await asyncio.to_thread(_result, job, handle, arrived)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Events as plain dicts: queued, step and preview, and at last done with the `response`.

        A refused request raises before the first event. Closing the iterator stops the work.
        """
        with self._admitted():
            arrived = time.monotonic()
            order = await self._settle(request, arrived)
            yield {"event": "queued", "position": self._num_requests - 1, "eta": None}
            handle, job = await self._submit(order)
            del order  # and its pictures, while it runs
            async with aclosing(handle.events()) as events:
                async for event in events:
                    for message in _messages(event):
                        yield message
            result = await asyncio.to_thread(_result, job, handle, arrived)
            response = await _respond(result)
            yield {"event": "done", "response": response}

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count a request in; refuse it when too many are unfinished."""
        limit = self.settings.max_queue_size + self.settings.max_batch_size
        if self._num_requests >= limit:
            raise Overloaded(
                f"the queue is full: {self._num_requests} requests are unfinished "
                f"(MAX_QUEUE_SIZE={self.settings.max_queue_size} beside "
                f"MAX_BATCH_SIZE={self.settings.max_batch_size}); try again later",
                retry_after=self.engine.seconds_per_request,
            )
        self._count_requests(1)
        try:
            yield
        finally:
            self._count_requests(-1)

    def _count_requests(self, change: int) -> None:
        self._num_requests += change
        queue_depth.set(max(0, self._num_requests - self.settings.max_batch_size))
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        idle = self._num_requests == 0
        loop = asyncio.get_running_loop()
        self._idle_timer = loop.call_later(IDLE, release_freed_memory) if idle else None

    def _deadline(self, request: GenerateRequest, arrived: float) -> float:
        return arrived + (request.timeout or self.settings.request_timeout)

    async def _settle(self, request: GenerateRequest, arrived: float) -> Order:
        """Everything that can be told, and refused, before a model is there."""
        spec = await self._look_up(request.model or self.settings.sd_model)
        settled = settle(request, spec)
        asked = settled.controlnet or ()
        controlnets = [await self._look_up_controlnet(control.type, spec) for control in asked]
        refiner = None
        if settled.refiner is not None:
            refiner = await self._look_up(settled.refiner.model)
            if refiner.family is not spec.family:
                raise InvalidParameter(
                    f"refiner.model must be an SDXL model; {refiner.name} is not one",
                    param="refiner.model",
                )
        deadline = self._deadline(request, arrived)
        pictures = await self._gather(settled, deadline)
        settled, warnings = fix_size(settled, spec, pictures, self.settings.max_pixels)
        if any(control.preprocess for control in settled.controlnet or ()):
            pictures = await asyncio.to_thread(draw_controls, settled, pictures)
        return Order(settled, spec, controlnets, refiner, pictures, warnings, deadline)

    async def _gather(self, settled: GenerateRequest, deadline: float) -> Pictures:
        if not needs_pictures(settled):
            return Pictures()
        threads = self._readers if has_urls(settled) else None  # None: asyncio's own
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(threads, gather, settled, self.settings)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await reading
        except TimeoutError:
            raise DeadlineExceeded(
                "the pictures were not fetched within the request's timeout", param="timeout"
            ) from None

    async def _look_up(self, name: str) -> ModelSpec:
        known = self.catalog.known(name)
        return known if known is not None else await self._call_hub(self.catalog.resolve, name)

    async def _look_up_controlnet(self, name: str, spec: ModelSpec) -> ControlNetSpec:
        known = self.catalog.known_controlnet(name, spec)
        if known is not None:
            return known
        return await self._call_hub(self.catalog.resolve_controlnet, name, spec)

    async def _call_hub(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask files or the Hub about a name; in threads of its own, for the Hub may be slow."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._lookups, partial(function, *args, **kwargs))
        except Exception as exc:
            reraise(exc)

    async def _submit(self, order: Order) -> tuple[Handle, Job]:
        lease = await self._lease(order.specs, order.deadline)
        try:
            job = await asyncio.to_thread(
                self._assembler.assemble,
                order.settled,
                order.pictures,
                order.resources(lease),
                order.warnings,
            )
            handle = self.engine.submit(job.trajectories, order.deadline)
        except BaseException:
            lease.release()
            raise
        handle.done.add_done_callback(lambda _: lease.release())
        return handle, job

    async def _lease(self, specs: list[ModelSpec | ControlNetSpec], deadline: float) -> Lease:
        """Wait until the models are resident; other models keep stepping meanwhile."""
        future = self.pipelines.acquire(*specs)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            give_up(future)
            raise DeadlineExceeded(
                f"{' and '.join(spec.name for spec in specs)} could not be loaded within the "
                "request's timeout",
                param="timeout",
            ) from None
        except asyncio.CancelledError:
            give_up(future)
            raise
        except Exception as exc:
            reraise(exc)

    def _load_default(self) -> None:
        """Load, and compile, the default model; where that may help, try again until it works."""
        name, pause = self.settings.sd_model, FIRST_RETRY
        while not self._closed.is_set():
            try:
                spec = self.catalog.resolve(name)
                calibration = self._calibration(spec)
                with self.pipelines.lease(spec) as pipeline:
                    if self.settings.compile:
                        self.engine.call(partial(calibration.compile, pipeline)).result()
                self._default_loaded.set()
                self.engine.when_idle(calibration.measurements())
                return
            except Exception as exc:
                if self._closed.is_set():
                    return
                error = classify(exc)
                log.error("the default model %s cannot be loaded: %s", name, error.message)
                log.debug("details", exc_info=exc)
                if error.status < 500:  # no such model: trying again will not help
                    return
            self._closed.wait(pause)
            pause = min(2 * pause, LAST_RETRY)

    def _calibration(self, spec: ModelSpec) -> Calibration:
        max_rows = ROWS_PER_IMAGE * self.settings.max_batch_size
        return Calibration(spec, self.pipelines, self.runner, self.planner.cost, max_rows)


def _result(job: Job, handle: Handle, arrived: float) -> Result:
    """Blocking: pictures may have to be put back into their originals."""
    now = time.monotonic()
    started = handle.started or now
    made = [t.image for t in handle.trajectories if t.image is not None]
    return Result(
        request=job.request,
        images=[job.overlay.apply(image) for image in made] if job.overlay else made,
        timings=Timings(
            queued=round(started - arrived, 4),
            denoising=round(now - started - handle.decoding, 4),
            decoding=round(handle.decoding, 4),
            total=round(now - arrived, 4),
        ),
        warnings=list(job.warnings),
    )


async def _respond(result: Result) -> GenerateResponse:
    """Encode off the event loop; a picture takes milliseconds."""

    def encode_all() -> list[str]:
        return [b64encode(result.encode(i)).decode("ascii") for i in range(len(result.images))]

    return GenerateResponse(
        images=await asyncio.to_thread(encode_all),
        seeds=result.seeds,
        model=str(result.request.model),
        parameters=result.parameters(),
        timings=result.timings,
        warnings=result.warnings,
    )


def _messages(event: Event) -> Iterator[dict[str, Any]]:
    """An engine's event as the dicts that doors send."""
    if isinstance(event, Queued):
        yield {
            "event": "queued",
            "position": event.position,
            "eta": round(event.eta, 3),
        }
        return
    place = {"image": event.image, "step": event.step, "num_steps": event.num_steps}
    yield {"event": "step", **place, "eta": round(event.eta, 3)}
    if event.preview is not None:
        picture = b64encode(codec.encode(event.preview, "jpeg")).decode("ascii")
        yield {"event": "preview", **place, "preview": picture}
