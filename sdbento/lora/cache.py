"""The LoRAs in memory, by model. A file is read when an image first needs it."""

from __future__ import annotations

import itertools
import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from cachetools import LRUCache

from sdbento.lora.files import read
from sdbento.lora.hooks import Adapter
from sdbento.lora.layers import num_bytes, to_parts
from sdbento.lora.lookup import LoraSource, Url
from sdbento.metrics.definitions import lora_loads_total
from sdbento.models.pipeline import Pipeline
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MB = 1e6
_ids = itertools.count(1)


class _Loaded(LRUCache[str, tuple[LoraSource, Adapter]]):
    """One model's LoRAs by name, with the files that they were read from."""

    def popitem(self) -> tuple[str, tuple[LoraSource, Adapter]]:
        name, loaded = super().popitem()
        log.info("LoRA %s is dropped from memory to make room for another", name)
        return name, loaded


@dataclass
class _Adapters:
    """One model's: those in memory, and those that a thread is loading just now."""

    loaded: _Loaded
    loading: dict[LoraSource, Future[Adapter]] = field(default_factory=dict)

    def find(self, source: LoraSource) -> Adapter | None:
        """None also for one that was read from an older version of the file."""
        known, adapter = self.loaded.get(source.name) or (None, None)
        return adapter if known == source else None


class AdapterCache:
    """Keeps each model's last `settings.max_loras` adapters; they are dropped with their model.

    Thread-safe. Files are read outside of the lock, and each only once however many threads ask for
    it. A dropped adapter stays in memory for as long as somebody uses it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models: WeakKeyDictionary[Pipeline, _Adapters] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def holds(self, source: LoraSource) -> bool:
        """Whether any model has it in memory, so that its file need not be asked for."""
        with self._lock:
            return any(adapters.find(source) for adapters in self._models.values())

    def get(self, pipeline: Pipeline, source: LoraSource) -> Adapter:
        """That LoRA on `pipeline`'s device. Blocking: may read a file.

        Raises what `read` raises, and UnsupportedModel for a LoRA that does not fit.
        """
        with self._lock:
            if (adapters := self._models.get(pipeline)) is None:
                adapters = self._models[pipeline] = _Adapters(_Loaded(self._settings.max_loras))
            if (adapter := adapters.find(source)) is not None:
                return adapter
            future = adapters.loading.get(source)
            if is_first := future is None:
                future = adapters.loading[source] = Future()
        if is_first:
            self._load(pipeline, source, adapters, future)
        return future.result()

    def must_fetch(self, pipeline: Pipeline, source: LoraSource) -> bool:
        """Whether `get` would ask another host, which may be slow: what is on the Hub has been
        fetched before (`files.fetch_lora`)."""
        if not isinstance(source.place, Url):
            return False
        with self._lock:
            adapters = self._models.get(pipeline)
            return adapters is None or adapters.find(source) is None

    def _load(
        self,
        pipeline: Pipeline,
        source: LoraSource,
        adapters: _Adapters,
        future: Future[Adapter],
    ) -> None:
        """Load for all who wait for `future`; a failure is theirs too, but the next one who asks
        tries again."""
        try:
            adapter = load(pipeline, source, self._settings)
        except BaseException as error:
            with self._lock:
                del adapters.loading[source]
            future.set_exception(error)
            return
        with self._lock:
            del adapters.loading[source]
            adapters.loaded[source.name] = (source, adapter)
        future.set_result(adapter)


def load(pipeline: Pipeline, source: LoraSource, settings: Settings) -> Adapter:
    """Read a file into matrices on the model's device, in its precision."""
    parts, warnings = to_parts(source, read(source, settings), pipeline)
    adapter = Adapter(source.name, next(_ids), parts, num_bytes(parts), warnings)
    lora_loads_total.add()
    log.info(
        "LoRA %s is on %s for model %s: %.1f MB, %d layers",
        *(source.name, pipeline.device, pipeline.spec.name, adapter.nbytes / MB),
        sum(map(len, parts.values())),
    )
    return adapter
