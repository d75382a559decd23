"""`App` is the one way in for every door: generate, run, stream. Wires everything, once.

    admit -> resolve -> backend -> result

Knows nothing of HTTP; doors know nothing of what is below.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from sdbento.access.caller import current_caller
from sdbento.admission import Admission
from sdbento.backend.choice import choose_backend
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ModelSpec, catalogued_controlnets
from sdbento.course import Course
from sdbento.engine.handle import Estimated, Handle, Stepped
from sdbento.engine.trajectory import Runner
from sdbento.environment import unknown_variables
from sdbento.errors import stopping
from sdbento.live.batch import Batch, ResidentModel
from sdbento.live.privacy import Watcher, seen_by
from sdbento.live.watchers import Watchers
from sdbento.models.device import GB
from sdbento.process.malloc import start_releasing
from sdbento.prompts.inversions import Inversions
from sdbento.request.events import Done, Event, Queued
from sdbento.request.resolve import Resolver
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.result import Result, RunningRequest
from sdbento.request.schema import GenerateRequest, GenerateResponse
from sdbento.samplers.names import SamplerInfo, list_samplers
from sdbento.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ListedModel:
    """A model that requests can name; whether it is the default; by what it computes attention if
    it is in memory, else None; and the numbers of the devices that have it there."""

    spec: ModelSpec
    is_default: bool
    attention: str | None
    devices: tuple[int, ...] = ()


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
        inversions = Inversions(settings)
        self.backend = choose_backend(
            settings, self.catalog, inversions, runner, self.report_broken
        )
        self.watchers = Watchers(self.backend)
        self._resolver = Resolver(settings, self.catalog, inversions)
        self.image_threads = self._resolver.image_threads
        self._admission = Admission(settings, lambda: self.backend.endings, self.num_devices)
        self._resolving = set[asyncio.Timeout]()
        self._closed = threading.Event()
        self._broken, self._can_finish = False, True
        self._break_lock = threading.Lock()  # guards both

    def start(self) -> None:
        """Start what makes the images; it begins to load the default model in the background.

        From here on torch computes with one thread everywhere else in this process.
        """
        for variable in unknown_variables():
            log.warning("%s is set, but no setting has that name", variable)
        self.backend.start()
        start_releasing(self._closed)

    @property
    def alive(self) -> bool:
        """Whether this process can still make images; if not, only a new one can."""
        return self.backend.alive and not self._broken

    @property
    def ready(self) -> bool:
        """Whether requests can be sent: this process is alive and has loaded the default model."""
        return self.alive and self.backend.ready

    @property
    def num_devices(self) -> int:
        """How many compute, each with a batch of its own."""
        return len(self.backend.devices())

    @property
    def num_requests(self) -> int:
        """How many requests are unfinished."""
        return self._admission.num_requests

    def close(self, grace: float = 30.0) -> None:
        """Finish what is under way for up to `grace` seconds, refuse the rest, free everything."""
        self._closed.set()
        self.backend.close(grace)
        self._resolver.close()

    def give_up(self) -> None:
        """Refuse new requests, and fail those under way: the server has to stop now. On the event
        loop that serves them."""
        self.backend.give_up()
        now = asyncio.get_running_loop().time()
        for limit in self._resolving:
            limit.reschedule(now)

    def list_models(self) -> list[ListedModel]:
        """The models that the present caller may use."""
        residents = self.backend.residents()
        attention = {one.spec.key: one.attention for one in residents}
        devices = defaultdict[str, list[int]](list)
        for one in residents:
            devices[one.spec.key].append(one.device or 0)
        return [
            ListedModel(
                spec,
                self.settings.sd_model in spec.names,
                attention.get(spec.key),
                tuple(devices[spec.key]),
            )
            for spec in self.catalog.list()
            if self.catalog.is_allowed(spec.name)
        ]

    def resident_models(self) -> frozenset[str]:
        """The names of the models in memory, also their aliases."""
        specs = [resident.spec for resident in self.backend.residents()]
        models = [spec for spec in specs if isinstance(spec, ModelSpec)]
        return frozenset(name for model in models for name in model.names)

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
                devices = self.backend.devices()
                yield seen_by(watcher, snapshot, self._residents(), num_preparing, devices)

    def _visible_names(self) -> set[str]:
        """Of the models that the present caller may use, and of ControlNets."""
        models = {model.spec.name for model in self.list_models()}
        catalogued = catalogued_controlnets().values()
        return models | {spec.name for specs in catalogued for spec in specs.values()}

    def _residents(self) -> Iterator[ResidentModel]:
        for resident in self.backend.residents():
            spec, memory_gb = resident.spec, round(resident.nbytes / GB, 3)
            is_model = isinstance(spec, ModelSpec)
            kind: Literal["model", "controlnet"] = "model" if is_model else "controlnet"
            yield ResidentModel(spec.name, kind, memory_gb, resident.device)

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
        """Raises Unavailable if no image can be made any more; tells the backend of failures."""
        self.backend.check_usable()
        try:
            yield
        except Exception as error:
            self.backend.notice(error)
            raise

    async def _begin(self, request: ResolvedRequest) -> RunningRequest:
        return RunningRequest(request, await self.backend.begin(request))

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

    def report_broken(self, reason: str) -> None:
        """Something in this process has failed for good: `alive` is False from now on.

        Also for parts that App does not know, like the jobs.
        """
        with self._break_lock:
            can_finish = self.backend.alive
            if self._broken and (can_finish or not self._can_finish):
                return
            self._broken, self._can_finish = True, can_finish
            log.error("%s: this process must be replaced", reason)
            self._on_broken(can_finish)
