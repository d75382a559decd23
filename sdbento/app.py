"""`App` is the one way in for every door: generate, run, stream. Wires everything, once.

    admit -> resolve -> lease models -> build trajectories -> engine -> result

Knows nothing of HTTP; doors know nothing of what is below.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from PIL import Image

from sdbento.access.caller import current_caller
from sdbento.access.threads import SharedThreads
from sdbento.admission import Admission
from sdbento.backoff import Backoff
from sdbento.catalog.downloads.queue import Downloads
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ControlNetSpec, ModelSpec, catalogued_controlnets
from sdbento.course import Course
from sdbento.engine.cost import CostModel
from sdbento.engine.handle import Estimated, Handle, Stepped
from sdbento.engine.loop import Engine, replaced
from sdbento.engine.planner import ROWS_PER_IMAGE, Planner
from sdbento.engine.trajectory import Runner
from sdbento.environment import unknown_variables
from sdbento.errors import DeadlineExceeded, classify, is_sick, reraise, stopping
from sdbento.images.redaction import public_name, without_secrets
from sdbento.live.batch import Batch, ResidentModel
from sdbento.live.privacy import Watcher, seen_by
from sdbento.live.snapshot import About
from sdbento.live.watchers import Watchers
from sdbento.lora.files import fetch_lora
from sdbento.models.cache import PipelineCache
from sdbento.models.device import GB
from sdbento.models.leases import Lease, give_up
from sdbento.process.malloc import release_freed_memory
from sdbento.process.threads import compute_only_on, num_cores
from sdbento.prompts.inversions import Inversions
from sdbento.request.build import TrajectoryBuilder
from sdbento.request.events import Done, Event, Queued
from sdbento.request.resolve import Resolver
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.result import Result, RunningRequest
from sdbento.request.schema import GenerateRequest, GenerateResponse
from sdbento.runner.calibration import Calibration
from sdbento.runner.graphs import bucket, make_graphs
from sdbento.runner.torch_runner import TorchRunner
from sdbento.samplers.names import SamplerInfo, canonical_name, list_samplers
from sdbento.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_RETRY = 5.0  # seconds until the default model is tried again; doubled each time, up to
LAST_RETRY = 60.0  # this
RELEASE_EVERY = 60.0  # seconds after which freed memory goes back to the kernel
RELIEF = 60.0  # seconds in which the engine's thread gives up memory, between two steps
LORA_THREADS = 8  # requests that wait for LoRAs from other hosts, which may be slow


@dataclass(frozen=True)
class ListedModel:
    """A model that requests can name; whether it is the default; and by what it computes attention
    if it is in memory, else None."""

    spec: ModelSpec
    is_default: bool
    attention: str | None


class App:
    """Everything behind the doors. Make it, `start` it, ask it, `close` it.

    Requests are counted on the event loop that serves them; everything else is thread-safe.
    `runner` None: the real one. `on_broken` is called if this process must be replaced, by any
    thread, with whether requests under way can still be finished; and again if they no longer can.
    It must return at once.
    """

    def __init__(
        self,
        settings: Settings,
        runner: Runner | None = None,
        on_broken: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self._on_broken = on_broken
        self.catalog = Catalog(settings)
        self.downloads = Downloads()
        self.pipelines = PipelineCache(settings, downloads=self.downloads)
        graphs = make_graphs(settings, self.pipelines)
        cost = CostModel(computed_rows=bucket if graphs else None)
        self.planner = Planner(settings.max_batch_size, cost)
        self.runner = runner or TorchRunner(graphs=graphs, grow=self.pipelines.grow)
        self.engine = Engine(
            self.runner, self.planner, stall=settings.stall_seconds, on_failure=self._lose_engine
        )
        self.watchers = Watchers(self.engine)
        if graphs is not None:
            self.pipelines.relieve = lambda: self.engine.call(graphs.forget).result(RELIEF)
        inversions = Inversions(settings)
        self._resolver = Resolver(settings, self.catalog, inversions)
        self.image_threads = self._resolver.image_threads
        self._builder = TrajectoryBuilder(settings, inversions)
        self._lora_threads = SharedThreads(LORA_THREADS, "sdbento-lora")
        self._admission = Admission(settings, lambda: self.engine.endings)
        self._resolving = set[asyncio.Timeout]()
        self._default_loaded = threading.Event()
        self._closed = threading.Event()
        self._broken, self._can_finish = False, True
        self._break_lock = threading.Lock()  # guards both

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
        threading.Thread(target=self._release_memory, name="sdbento-memory", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether this process can still make images; if not, only a new one can."""
        return self.engine.alive and not self._broken

    @property
    def ready(self) -> bool:
        """Whether requests can be sent: this process is alive and has loaded the default model."""
        return self.alive and self._default_loaded.is_set()

    @property
    def num_requests(self) -> int:
        """How many requests are unfinished."""
        return self._admission.num_requests

    def close(self, grace: float = 30.0) -> None:
        """Finish what is under way for up to `grace` seconds, refuse the rest, free everything."""
        self._closed.set()
        self.engine.close(grace)
        self.pipelines.close()
        self._resolver.close()
        self._lora_threads.shutdown(wait=False, cancel_futures=True)

    def give_up(self) -> None:
        """Refuse new requests, and fail those under way: the server has to stop now. On the event
        loop that serves them."""
        self.engine.give_up()
        self.pipelines.abandon()
        now = asyncio.get_running_loop().time()
        for limit in self._resolving:
            limit.reschedule(now)

    def list_models(self) -> list[ListedModel]:
        """The models that the present caller may use."""
        attention = {key: one.attention.name for key, one in self.pipelines.residents().items()}
        return [
            ListedModel(spec, self.settings.sd_model in spec.names, attention.get(spec.key))
            for spec in self.catalog.list()
            if self.catalog.is_allowed(spec.name)
        ]

    def list_samplers(self) -> list[SamplerInfo]:
        return list_samplers()

    async def watch(self, *, has_own: bool = True) -> AsyncGenerator[Batch, None]:
        """The running batch as the present caller may see it, ten times a second at most.

        `has_own` False: the caller cannot be told from others, so that no request is his own. Ends
        when the server stops. Raises Overloaded where too many watch already, Unavailable.
        """
        async with aclosing(self.watchers.snapshots()) as snapshots:
            names = await asyncio.to_thread(self._visible_names)
            owner = current_caller().owner if has_own else None
            watcher = Watcher(owner, names.__contains__)
            async for snapshot in snapshots:
                num_preparing = max(0, self.num_requests - snapshot.batch.queue.requests)
                yield seen_by(watcher, snapshot, self._residents(), num_preparing)

    def _visible_names(self) -> set[str]:
        """Of the models that the present caller may use, and of ControlNets."""
        models = {model.spec.name for model in self.list_models()}
        catalogued = catalogued_controlnets().values()
        return models | {spec.name for specs in catalogued for spec in specs.values()}

    def _residents(self) -> Iterator[ResidentModel]:
        for resident in self.pipelines.residents().values():
            spec, memory_gb = resident.spec, round(resident.nbytes / GB, 3)
            is_model = isinstance(spec, ModelSpec)
            yield ResidentModel(spec.name, "model" if is_model else "controlnet", memory_gb)

    async def find_model(self, name: str | None = None) -> ModelSpec:
        """The model that requests mean by `name`; None: the default.

        Counts as a request where files or the Hub must be asked.
        """
        is_known = self.catalog.known(name or self.settings.sd_model) is not None
        async with nullcontext() if is_known else self.counted():
            return await self._resolver.find_model(name)

    async def read_image(self, source: str, *, param: str) -> Image.Image:
        """The image that a field `param` of a request holds: a URL, a data URI or base64."""
        async with self.counted():
            return await self._resolver.read_image(source, param)

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Make the images of `request`. Raises errors of the `errors` tree only."""
        return await (await self.run(request)).to_response(self.image_threads)

    async def run(self, request: GenerateRequest) -> Result:
        """As `generate`, but the images come as they are. Cancelling this stops the work."""
        async with self._admitted(request):
            with Course(request) as course:
                resolved = await self._resolve(request, course.arrived)
                course.resolved(resolved)
                running = await self._begin(resolved)
                course.begun(running)
                return await running.result(self.image_threads)

    async def stream(
        self,
        *requests: GenerateRequest,
        on_start: Callable[[Handle], None] = lambda _: None,
        seconds: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """What happens to a request, and at last Done.

        A refused request raises before the first event. Closing the iterator stops the work.
        `on_start` is given the request's handle once the engine has it. Several requests are
        made one after another and admitted as one: the queue counts the images of the largest, a
        key's images at once those of all. `seconds`: for which each may run, where that is not for
        its `timeout` and the settings to say.
        """
        async with self._admitted(*requests):
            for request in requests:
                with Course(request) as course:
                    async with aclosing(self._events(course, request, on_start, seconds)) as events:
                        async for event in events:
                            yield event

    async def _events(
        self,
        course: Course,
        request: GenerateRequest,
        on_start: Callable[[Handle], None],
        seconds: float | None,
    ) -> AsyncGenerator[Event, None]:
        resolved = await self._resolve(request, course.arrived, seconds)
        course.resolved(resolved)
        position = self.num_requests - 1
        yield Queued(position, size=resolved.size, warnings=resolved.warnings)
        running = await self._begin(resolved)
        del resolved  # and its images, while it runs
        course.begun(running)
        on_start(running.handle)
        async with aclosing(running.handle.events()) as events:
            async for event in events:
                match event:
                    case Estimated(eta):
                        yield Queued(self.num_requests - 1, eta)
                    case Stepped():
                        yield event
        result = await running.result(self.image_threads)
        yield Done(await result.to_response(self.image_threads))

    @asynccontextmanager
    async def _admitted(self, *requests: GenerateRequest) -> AsyncIterator[None]:
        """Count requests that are made one after another, as one, or refuse it."""
        with self._usable():
            async with self._admission.admitted(*requests):
                yield

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Count a request of the present caller that makes no image; refuse it when there is no
        room."""
        with self._usable():
            async with self._admission.counted():
                yield

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Raises Unavailable if the engine cannot make images any more; remembers a lost GPU."""
        self.engine.check_usable()
        try:
            yield
        except Exception as error:
            self._notice_sickness(error)
            raise

    async def _resolve(
        self, request: GenerateRequest, arrived: float, seconds: float | None = None
    ) -> ResolvedRequest:
        """What comes before the engine, such as images of slow hosts; `give_up` ends it."""
        try:
            async with asyncio.timeout(None) as limit:
                self._resolving.add(limit)
                return await self._resolver.resolve(request, arrived, seconds)
        except TimeoutError:
            if limit.expired():
                raise stopping() from None
            raise
        finally:
            self._resolving.discard(limit)

    def seconds_until_end(self, owner: str | None) -> float:
        """Seconds until a request of `owner` will have ended, or where he has none, of anybody."""
        return self._admission.seconds_until_end(owner)

    def _notice_sickness(self, error: Exception) -> None:
        """After a device error every later request fails as well, until the process is replaced;
        `alive` tells whoever can do that."""
        if is_sick(error):
            self._lose_engine("the GPU has failed")

    def _lose_engine(self, reason: str) -> None:
        """No image can be made any more: whoever waits for one is told at once."""
        self.engine.abandon()
        self.pipelines.abandon(replaced)
        self.report_broken(reason)

    def report_broken(self, reason: str) -> None:
        """Something in this process has failed for good: `alive` is False from now on.

        Also for parts that App does not know, like the jobs.
        """
        with self._break_lock:
            can_finish = self.engine.alive
            if self._broken and (can_finish or not self._can_finish):
                return
            self._broken, self._can_finish = True, can_finish
            log.error("%s: this process must be replaced", reason)
            self._on_broken(can_finish)

    async def _begin(self, request: ResolvedRequest) -> RunningRequest:
        """Fetch LoRAs, lease the models and hand the request to the engine."""
        await self._fetch_loras(request)
        lease = await self._lease(request.specs, request.deadline)
        try:
            models = request.models(lease)
            fetches = self._builder.must_fetch(request, models)
            run = self._lora_threads.run if fetches else asyncio.to_thread
            trajectories, warnings = await run(self._builder.build, request, models)
            own_sampler = str(models.pipeline.scheduler_config["_class_name"])
            about = _about(request, own_sampler)
            handle = self.engine.submit(trajectories, request.deadline, about)
        except BaseException:
            lease.release()
            raise
        handle.done.add_done_callback(lambda _: lease.release())
        return RunningRequest(request, handle, own_sampler, warnings)

    async def _fetch_loras(self, request: ResolvedRequest) -> None:
        """Download those of the Hub, before the request holds a lease."""
        futures = {
            name: self.downloads.want(
                f"LoRA {name}", partial(fetch_lora, name, place, self.settings)
            )
            for name, place in self._builder.absent_loras(request).items()
        }
        try:
            for name, future in futures.items():
                await _wait(future, request.deadline, f"LoRA {name}")
        finally:
            for future in futures.values():
                future.cancel()

    async def _lease(self, specs: list[ModelSpec | ControlNetSpec], deadline: float) -> Lease:
        """Wait until the models are resident; other models keep stepping meanwhile."""
        future = self.pipelines.acquire(*specs)
        try:
            return await _wait(future, deadline, " and ".join(spec.name for spec in specs))
        except BaseException:
            give_up(future)
            raise

    def _load_default(self) -> None:
        """Load, and compile, the default model; where that may help, try again until it works."""
        backoff = Backoff(FIRST_RETRY, LAST_RETRY)
        while not (self._closed.is_set() or self._try_default()):
            self._closed.wait(backoff.next_pause())

    def _release_memory(self) -> None:
        """Also beside requests: the heap of a server that is never idle has ever more holes."""
        while not self._closed.wait(RELEASE_EVERY):
            release_freed_memory()

    def _try_default(self) -> bool:
        """Whether there is nothing more to try: it was loaded, or no such model can be had."""
        name = self.settings.sd_model
        try:
            spec = self.catalog.resolve(name)
            calibration = self._calibration(spec)
            with self.pipelines.lease(spec) as pipeline:
                if self.settings.compile:
                    self.engine.call(partial(calibration.compile, pipeline)).result()
        except Exception as exc:
            error = classify(exc)
            if not self._closed.is_set():
                self._notice_sickness(exc)
                log.error("the default model %s cannot be loaded: %s", name, error.message)
                log.debug("details", exc_info=exc)
            return error.status < 500
        self._default_loaded.set()
        self.engine.when_idle(self._watched(calibration.measurements()))
        return True

    def _watched(self, work: Iterator[None]) -> Iterator[None]:
        """`work`, whose errors no request would hear of: the engine gives it up."""
        try:
            yield from work
        except Exception as error:
            self._notice_sickness(error)
            raise

    def _calibration(self, spec: ModelSpec) -> Calibration:
        max_rows = ROWS_PER_IMAGE * self.settings.max_batch_size
        return Calibration(spec, self.pipelines, self.runner, self.planner.cost, max_rows)


def _about(request: ResolvedRequest, own_sampler: str) -> About:
    """What those who watch the batch are told of a request."""
    settled = request.settled
    return About(
        prompt=without_secrets(settled.prompt),
        sampler=settled.scheduler or canonical_name(own_sampler),
        loras=tuple(public_name(lora.source.name) for lora in request.loras),
        num_controlnets=len(request.controlnets),
    )


async def _wait(future: Future[T], deadline: float, what: str) -> T:
    """The result of work on `what`. Raises errors of the `errors` tree, and leaves the future as it
    is: whoever gives up must say so."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await asyncio.shield(asyncio.wrap_future(future))
    except TimeoutError:
        raise DeadlineExceeded(
            f"{what} could not be loaded within the request's timeout", param="timeout"
        ) from None
    except Exception as exc:
        reraise(exc)
