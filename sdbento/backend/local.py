"""One device, in this process: its models, its engine, and what builds the trajectories.

    fetch LoRAs -> lease models -> build trajectories -> engine

Knows nothing of admission, or of how names and images of a request were found.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from sdbento.access.threads import SharedThreads
from sdbento.backend.protocol import ResidentSpec
from sdbento.backoff import Backoff
from sdbento.catalog.downloads.queue import Downloads
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ModelSpec, Spec
from sdbento.engine.cost import CostModel
from sdbento.engine.forecast import Ending
from sdbento.engine.loop import Engine, replaced
from sdbento.engine.planner import ROWS_PER_IMAGE, Planner
from sdbento.engine.trajectory import Runner
from sdbento.errors import DeadlineExceeded, classify, is_sick, reraise
from sdbento.images.redaction import public_name, without_secrets
from sdbento.live.batch import Device
from sdbento.live.observation import Observation
from sdbento.live.snapshot import About, Snapshot
from sdbento.lora.files import fetch_lora
from sdbento.models.cache import PipelineCache
from sdbento.models.device import choose_device, device_name
from sdbento.models.leases import Lease, give_up
from sdbento.process.threads import compute_only_on, num_cores
from sdbento.prompts.inversions import Inversions
from sdbento.request.build import TrajectoryBuilder
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.result import Begun
from sdbento.runner.calibration import Calibration
from sdbento.runner.graphs import bucket, make_graphs
from sdbento.runner.torch_runner import TorchRunner
from sdbento.samplers.names import canonical_name
from sdbento.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_RETRY = 5.0  # seconds until the default model is tried again; doubled each time, up to
LAST_RETRY = 60.0  # this
RELIEF = 60.0  # seconds in which the engine's thread gives up memory, between two steps
LORA_THREADS = 8  # requests that wait for LoRAs from other hosts, which may be slow


class LocalBackend:
    """A Backend for the device of this process.

    `runner` None: the real one. `on_lost` is called, by any thread, when the device or the engine
    has failed for good, with the reason; it must return at once. All requests have been failed.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        inversions: Inversions,
        runner: Runner | None = None,
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._on_lost = on_lost
        self._downloads = Downloads()
        self.pipelines = PipelineCache(settings, downloads=self._downloads)
        graphs = make_graphs(settings, self.pipelines)
        cost = CostModel(computed_rows=bucket if graphs else None)
        self.planner = Planner(settings.max_batch_size, cost)
        self.runner = runner or TorchRunner(graphs=graphs, grow=self.pipelines.grow)
        self.engine = Engine(
            self.runner, self.planner, stall=settings.stall_seconds, on_failure=self.lose
        )
        if graphs is not None:
            self.pipelines.relieve = lambda: self.engine.call(graphs.forget).result(RELIEF)
        self._device_name = device_name(choose_device(settings))
        self._builder = TrajectoryBuilder(settings, inversions)
        self._lora_threads = SharedThreads(LORA_THREADS, "sdbento-lora")
        self._default_loaded = threading.Event()
        self._closed = threading.Event()
        self.is_lost = False

    def start(self) -> None:
        """As Backend says. From here on torch computes with one thread everywhere else."""
        num_threads = self._settings.num_threads or num_cores()
        self.engine.start()
        compute_only_on(self.engine.call, num_threads)
        threading.Thread(target=self._load_default, name="sdbento-start", daemon=True).start()

    @property
    def alive(self) -> bool:
        return self.engine.alive

    @property
    def ready(self) -> bool:
        return self._default_loaded.is_set()

    @property
    def endings(self) -> Sequence[Ending]:
        return self.engine.endings

    def check_usable(self) -> None:
        self.engine.check_usable()

    def close(self, grace: float) -> None:
        self._closed.set()
        self.engine.close(grace)
        self.pipelines.close()
        self._lora_threads.shutdown(wait=False, cancel_futures=True)

    def give_up(self) -> None:
        self.engine.give_up()
        self.pipelines.abandon()

    def lose(self, reason: str) -> None:
        """No image can be made any more: whoever waits for one is told at once."""
        self.is_lost = True  # before those who wait are told
        self.engine.abandon()
        self.pipelines.abandon(replaced)
        self._on_lost(reason)

    def notice(self, error: Exception) -> None:
        """After a device error every later request fails as well, until the process is replaced."""
        if is_sick(error):
            self.lose("the GPU has failed")

    def residents(self) -> list[ResidentSpec]:
        return [
            ResidentSpec(one.spec, one.nbytes, one.attention.name)
            for one in self.pipelines.residents().values()
        ]

    def devices(self) -> list[Device]:
        return [Device(0, self._device_name, self.alive)]

    def preload(self, spec: ModelSpec) -> Future[Any]:
        """The model stays until others need the room. Why a load failed is in the log."""
        loading = self.pipelines.acquire(spec)
        loading.add_done_callback(_release)
        return loading

    def observe(
        self, publish: Callable[[Snapshot], None], on_failure: Callable[[], None]
    ) -> Callable[[], None]:
        return Observation(self.engine, publish, on_failure).end

    async def begin(self, request: ResolvedRequest, number: int | None = None) -> Begun:
        """Fetch LoRAs, lease the models and hand the request to the engine; `number`: see there."""
        await self._fetch_loras(request)
        lease = await self._lease(request.specs, request.deadline)
        try:
            models = request.models(lease)
            fetches = self._builder.must_fetch(request, models)
            run = self._lora_threads.run if fetches else asyncio.to_thread
            trajectories, warnings = await run(self._builder.build, request, models)
            own_sampler = str(models.pipeline.scheduler_config["_class_name"])
            about = _about(request, own_sampler)
            handle = self.engine.submit(trajectories, request.deadline, about, number)
        except BaseException:
            lease.release()
            raise
        handle.done.add_done_callback(lambda _: lease.release())
        return Begun(handle, own_sampler, warnings)

    async def _fetch_loras(self, request: ResolvedRequest) -> None:
        """Download those of the Hub, before the request holds a lease."""
        futures = {
            name: self._downloads.want(
                f"LoRA {name}", partial(fetch_lora, name, place, self._settings)
            )
            for name, place in self._builder.absent_loras(request).items()
        }
        try:
            for name, future in futures.items():
                await _wait(future, request.deadline, f"LoRA {name}")
        finally:
            for future in futures.values():
                future.cancel()

    async def _lease(self, specs: list[Spec], deadline: float) -> Lease:
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

    def _try_default(self) -> bool:
        """Whether there is nothing more to try: it was loaded, or no such model can be had."""
        name = self._settings.sd_model
        try:
            spec = self._catalog.resolve(name)
            calibration = self._calibration(spec)
            with self.pipelines.lease(spec) as pipeline:
                if self._settings.compile:
                    self.engine.call(partial(calibration.compile, pipeline)).result()
        except Exception as exc:
            error = classify(exc)
            if not self._closed.is_set():
                self.notice(exc)
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
            self.notice(error)
            raise

    def _calibration(self, spec: ModelSpec) -> Calibration:
        max_rows = ROWS_PER_IMAGE * self._settings.max_batch_size
        return Calibration(spec, self.pipelines, self.runner, self.planner.cost, max_rows)


def _release(loading: Future[Lease]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        loading.result().release()


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
