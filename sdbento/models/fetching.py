"""The files of models and ControlNets, downloaded before anything is loaded or memory reserved.

Knows nothing of leases or of what is resident.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from sdbento.catalog.downloads.process import HubProcess
from sdbento.catalog.downloads.queue import Downloads
from sdbento.catalog.specs import Spec
from sdbento.errors import Cancelled, classify, unexplained
from sdbento.models.leases import explain
from sdbento.models.weights import fetch
from sdbento.settings import Settings

log = logging.getLogger(__name__)

Sizes = dict[str, int]  # bytes of weights in memory, by key; 0 where the spec says it


class Fetching:
    """`capacity`: bytes that resident models may take together. Thread-safe."""

    def __init__(self, settings: Settings, downloads: Downloads, capacity: int) -> None:
        self._settings = settings
        self._downloads = downloads
        self._capacity = capacity

    def begin(self, specs: Sequence[Spec]) -> Future[Sizes]:
        """Fetch all of `specs`. Cancel the future to give up; what others want goes on.

        It fails with errors of the `errors` tree that name what could not be had.
        """
        return gather({spec.key: self._want(spec) for spec in specs})

    def close(self) -> None:
        self._downloads.close()

    def _want(self, spec: Spec) -> Future[int]:
        return self._downloads.want(spec.key, partial(self._fetch, spec))

    def _fetch(self, spec: Spec, hub: HubProcess) -> int:
        try:
            return fetch(spec, self._settings, hub, self._capacity)
        except Cancelled:
            raise
        except BaseException as exc:
            error = explain(spec, classify(exc))
            log.error("%s", error.message, exc_info=unexplained(exc))
            raise error from exc


def gather(futures: dict[str, Future[int]]) -> Future[Sizes]:
    """The results of all; the first error is the whole's. Cancelling it cancels all of them."""
    whole: Future[Sizes] = Future()
    lock = threading.Lock()
    results: Sizes = {}

    def collect(key: str, done: Future[int]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        with lock:
            if error is None:
                results[key] = done.result()
            is_over = error is not None or len(results) == len(futures)
            if not is_over or whole.done() or whole.running():
                return
            whole.set_running_or_notify_cancel()
        if error is not None:
            whole.set_exception(error)
        else:
            whole.set_result(results)

    whole.add_done_callback(lambda _: [future.cancel() for future in futures.values()])
    for key, future in futures.items():
        future.add_done_callback(partial(collect, key))
    return whole
