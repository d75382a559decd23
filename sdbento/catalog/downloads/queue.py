"""Downloads in turns: several at once, none behind another's, and none that nobody waits for.

Whoever wants something gets a future. Several who want the same share one download, which is
stopped once all of them have cancelled their futures. A caller gets no more places than are left to
others, as in every queue (`has_share`); who waits longest of those with the fewest is next.

Knows nothing of what is downloaded.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sdbento.access.caller import current_caller
from sdbento.access.limits import has_share
from sdbento.catalog.downloads.process import HubProcess
from sdbento.errors import stopping

log = logging.getLogger(__name__)

MAX_DOWNLOADS = 8  # at once; each is a process of some 50 MB

Work = Callable[[HubProcess], Any]


@dataclass(eq=False)
class _Download:
    key: Hashable
    work: Work
    owner: str | None  # who wanted it first
    hub: HubProcess = field(default_factory=HubProcess)
    waiters: list[Future[Any]] = field(default_factory=list)

    @property
    def is_wanted(self) -> bool:
        return not all(waiter.cancelled() for waiter in self.waiters)


class Downloads:
    """Thread-safe. Each download runs on a thread of its own.

    Callbacks of futures run without the lock.
    """

    def __init__(self, size: int = MAX_DOWNLOADS) -> None:
        self._size = size
        self._waiting: dict[Hashable, _Download] = {}  # the oldest first
        self._running: dict[Hashable, _Download] = {}
        self._closed = False
        self._lock = threading.Lock()

    def want(self, key: Hashable, work: Work) -> Future[Any]:
        """What `work` returns or raises; it is given the process that asks the Hub for it.

        `key` says what it is. Cancel the future to give it up.
        """
        waiter: Future[Any] = Future()
        with self._lock:
            if self._closed:
                waiter.set_exception(stopping())
                return waiter
            download = self._running.get(key) or self._waiting.get(key)
            if download is None or not download.is_wanted:  # the latter is being stopped
                download = _Download(key, work, current_caller().owner)
                self._waiting[key] = download
            download.waiters.append(waiter)
        waiter.add_done_callback(lambda _: self._stop_if_unwanted(download))
        self._start_next()
        return waiter

    def close(self) -> None:
        """Stop all downloads; those who wait are told."""
        with self._lock:
            self._closed = True
            waiting, running = [*self._waiting.values()], [*self._running.values()]
            self._waiting.clear()
        for download in waiting:
            _complete(download, None, stopping())
        for download in running:
            _end(download)

    def _start_next(self) -> None:
        with self._lock:
            while (download := self._next()) is not None:
                del self._waiting[download.key]
                self._running[download.key] = download
                name = "sdbento-download"
                threading.Thread(target=self._run, args=(download,), name=name, daemon=True).start()

    def _next(self) -> _Download | None:
        """Of those whose owner may have another place, that of the owner with the fewest."""
        own = Counter(download.owner for download in self._running.values())
        ready = [
            download
            for key, download in self._waiting.items()
            if key not in self._running  # its forerunner is being stopped
            and has_share(own[download.owner], len(self._running), self._size)
        ]
        return min(ready, key=lambda download: own[download.owner], default=None)

    def _run(self, download: _Download) -> None:
        result, error = None, None
        try:
            result = download.work(download.hub)
        except BaseException as caught:  # those who wait are told
            error = caught
        finally:
            download.hub.end()
            with self._lock:
                del self._running[download.key]
        _complete(download, result, error)
        self._start_next()

    def _stop_if_unwanted(self, download: _Download) -> None:
        with self._lock:
            if download.is_wanted:
                return
            if self._waiting.get(download.key) is download:
                del self._waiting[download.key]
            is_running = self._running.get(download.key) is download
        if is_running:
            log.info("the download of %s is stopped: nobody waits for it", download.key)
            _end(download)


def _end(download: _Download) -> None:
    """On a thread: this may be the event loop's, and a process takes a moment to end."""
    threading.Thread(target=download.hub.end, name="sdbento-stop", daemon=True).start()


def _complete(download: _Download, result: Any, error: BaseException | None) -> None:
    for waiter in download.waiters:
        if not waiter.set_running_or_notify_cancel():
            continue
        if error is None:
            waiter.set_result(result)
        else:
            waiter.set_exception(error)
