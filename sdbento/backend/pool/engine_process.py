"""An engine process: one device, which makes the images of requests that another process sends.

It ends as soon as that process is gone, whatever it is doing, and leaves signals to it: Ctrl-C
reaches all processes of a terminal, and requests under way are to be finished.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from sdbento.access.caller import acting_for
from sdbento.backend.local import LocalBackend
from sdbento.backend.pool.channel import Channel
from sdbento.backend.pool.messages import (
    Begin,
    Cancel,
    Close,
    Configure,
    Failed,
    Finished,
    GiveUp,
    Happened,
    Listen,
    Loaded,
    Lost,
    Message,
    Observe,
    Observed,
    Preload,
    Preview,
    Report,
    Submitted,
)
from sdbento.background import start_task
from sdbento.catalog.lookup import Catalog
from sdbento.engine.handle import EngineEvent, Handle
from sdbento.errors import classify
from sdbento.metrics.exposition import snapshot
from sdbento.process.malloc import keep_freed_memory, start_releasing
from sdbento.prompts.inversions import Inversions
from sdbento.settings import SettingsError
from sdbento.telemetry.log_format import formatter, log_what_python_prints, use_everywhere

log = logging.getLogger(__name__)

REPORT_EVERY = 0.5  # seconds


def main(fd: int) -> None:
    """Serve the process at the other end of the socket `fd`."""
    keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_serve(Channel(socket.socket(fileno=fd), "sdbento-channel")))


async def _serve(channel: Channel[Message]) -> None:
    loop = asyncio.get_running_loop()
    inbox = asyncio.Queue[Message]()

    def receive(message: Message) -> None:
        loop.call_soon_threadsafe(inbox.put_nowait, message)

    channel.start(receive, on_end=lambda: os._exit(0))  # even where the engine's thread hangs
    configure = await inbox.get()
    assert isinstance(configure, Configure)
    _log_as(configure)
    settings = configure.settings
    try:
        backend = LocalBackend(
            settings,
            Catalog(settings),
            Inversions(settings),
            on_lost=lambda reason: channel.send(Lost(reason)),
        )
    except SettingsError as error:
        channel.send(Lost(str(error)))
        await asyncio.Event().wait()  # the other process ends this one
    else:
        backend.start()
        start_releasing(threading.Event())
        await _EngineProcess(backend, channel).serve(inbox)


def _log_as(configure: Configure) -> None:
    """As the process that serves does, each line with the name of the device."""
    logging.basicConfig(force=True)
    use_everywhere(formatter(configure.settings.log_format))
    log_what_python_prints()
    logging.getLogger("sdbento").setLevel(configure.settings.log_level)

    def name_device(record: logging.LogRecord) -> bool:
        record.fields = {"device": configure.name, **getattr(record, "fields", {})}
        return True

    for handler in logging.root.handlers:
        handler.addFilter(name_device)


class _EngineProcess:
    """Obeys messages, on the event loop."""

    def __init__(self, backend: LocalBackend, channel: Channel[Message]) -> None:
        self._backend = backend
        self._channel = channel
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by the number of their request
        self._handles: dict[int, Handle] = {}
        self._preloads: dict[int, Future[Any]] = {}
        self._end_observation: Callable[[], None] | None = None

    async def serve(self, inbox: asyncio.Queue[Message]) -> None:
        """Until told to close."""
        reporting = start_task(self._report(), "sdbento report")
        while not isinstance(message := await inbox.get(), Close):
            self._obey(message)
            del message  # and its images, while this waits for the next
        await asyncio.to_thread(self._backend.close, message.grace)
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        reporting.cancel()
        await asyncio.to_thread(self._channel.close)
        os._exit(0)

    def _obey(self, message: Message) -> None:
        match message:
            case Begin(number):
                task = start_task(self._make(message), f"sdbento request {number}")
                self._tasks[number] = task
                task.add_done_callback(lambda _: self._forget(number))
            case Listen(number) if number in self._handles:
                handle = self._handles[number]
                if not handle.has_listeners:  # it may be said twice
                    handle.listen(partial(self._tell, number))
            case Preview(number, num_steps) if number in self._handles:
                self._handles[number].preview_every(num_steps)
            case Cancel(number):
                if number in self._tasks:
                    self._tasks[number].cancel()
                if number in self._preloads:
                    self._preloads[number].cancel()
            case Preload():
                self._preload(message)
            case Observe(wanted):
                self._observe(wanted)
            case GiveUp():
                self._backend.give_up()
            case _:
                log.debug("%s comes too late", type(message).__name__)

    def _forget(self, number: int) -> None:
        del self._tasks[number]
        self._handles.pop(number, None)

    async def _make(self, begin: Begin) -> None:
        number = begin.number
        try:
            with acting_for(begin.caller):
                begun = await self._backend.begin(begin.request, number)
            del begin  # and its images, while it runs
            handle = self._handles[number] = begun.handle
            self._channel.send(
                Submitted(number, begun.own_sampler, begun.warnings, handle.submitted)
            )
            await handle.wait()
        except Exception as error:
            self._fail(number, error)
        else:
            self._channel.send(Finished(number, handle.images, handle.calls))

    def _fail(self, number: int, error: Exception) -> None:
        """Where the device has failed, nobody is told but by `Lost`: another engine goes on."""
        self._backend.notice(error)
        if not self._backend.is_lost:
            handle = self._handles.get(number)
            calls = {} if handle is None else handle.calls_so_far()
            self._channel.send(Failed(number, classify(error), calls))

    def _tell(self, number: int, event: EngineEvent) -> None:
        self._channel.send(Happened(number, event))

    def _preload(self, preload: Preload) -> None:
        with acting_for(preload.caller):
            loading = self._preloads[preload.number] = self._backend.preload(preload.spec)
        loop = asyncio.get_running_loop()
        loading.add_done_callback(
            lambda _: loop.call_soon_threadsafe(self._end_preload, preload.number)
        )

    def _end_preload(self, number: int) -> None:
        del self._preloads[number]
        self._channel.send(Loaded(number))

    def _observe(self, wanted: bool) -> None:
        if self._end_observation is not None:
            self._end_observation()
            self._end_observation = None
        if wanted:
            self._end_observation = self._backend.observe(
                lambda snapshot: self._channel.send(Observed(snapshot)),
                on_failure=lambda: self._channel.send(Observed(None)),
            )

    async def _report(self) -> None:
        backend = self._backend
        while True:
            self._channel.send(
                Report(
                    is_ready=backend.ready,
                    endings=tuple(backend.endings),
                    residents=tuple(backend.residents()),
                    room=backend.pipelines.room(),
                    counted=snapshot(),
                    calls={n: handle.calls_so_far() for n, handle in self._handles.items()},
                )
            )
            await asyncio.sleep(REPORT_EVERY)
