"""CUDA graphs of whole steps: replayed by one call instead of launched kernel by kernel.

    step of 7 rows -> bucket of 8 -> captured? -> numbers, latents, rows into buffers -> replay
                                         └ no -> eager; captured after some more of its kind, or
                                                 at once where a model is measured

A step depends on shapes alone (`runner.step`), so it is captured for each model, size and *bucket*:
a number of rows up to which smaller steps are padded. Rows do not depend on each other, and the
padding holds finite numbers. What a graph reads and writes stays at its place in memory: buffers
and weights. A model that was offloaded comes back as a new Pipeline, elsewhere in memory, and so
without the old one's graphs.

Steps with LoRAs, ControlNets, DeepCache or merged tokens are not captured, since what surrounds
their UNet changes with their rows. Used on the engine's thread only.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from sdbento.engine.planner import ROWS_PER_IMAGE
from sdbento.engine.trajectory import BatchKey
from sdbento.metrics.definitions import rows_total
from sdbento.models.cache import PipelineCache
from sdbento.models.device import choose_device, say_once
from sdbento.models.pipeline import Pipeline
from sdbento.runner.batch import Batch
from sdbento.runner.numbers import Layout, views
from sdbento.runner.rows import Row, StackedRows
from sdbento.runner.step import Guidance, StepTensors, compute_step
from sdbento.runner.unet.call import call_unet
from sdbento.settings import Settings

log = logging.getLogger(__name__)

EAGER_CALLS = 3  # of a kind until it is captured: whoever comes once is not worth a capture
RETRY_AFTER = 256  # eager calls after one that did not fit into memory
MAX_SLOTS = 6  # latents and five tensors of memory: no sampler has more


def bucket(rows: int) -> int:
    """The number of rows that a captured step of `rows` rows computes."""
    step = 1 if rows <= 4 else 2 if rows <= 16 else 4
    return -(-rows // step) * step


class NoRoom(Exception):
    """A graph would need more memory than there is."""


class Capture(Protocol):
    """Captures what `work` gives to the device. One for each model; its graphs share memory."""

    def __call__(
        self, work: Callable[[], StepTensors], room: int
    ) -> tuple[StepTensors, Callable[[], None], int]:
        """What `work` has made, a function that makes it anew in the same memory, and the bytes
        that this takes for good. Raises NoRoom if they are more than `room`."""


class Memory(Protocol):
    """Who counts the memory of models."""

    def room(self) -> int:
        """Bytes that are free for graphs."""

    def grow(self, pipeline: Pipeline, nbytes: int) -> None:
        """`pipeline` takes so many bytes more, or less."""


class CapturedStep:
    """A step of up to `bucket` rows, with fixed places for what goes in and out."""

    def __init__(
        self,
        batch: Batch,
        rows: StackedRows,
        num_rows: int,
        capture: Capture,
        room: int,
    ) -> None:
        key, device = batch.key, batch.pipeline.device
        channels = batch.pipeline.latent_channels
        self._layout = Layout(rows=num_rows, images=num_rows, slots=MAX_SLOTS)
        shape = num_rows, MAX_SLOTS, channels, key.latent_height, key.latent_width
        self._slots = torch.zeros(shape, device=device)
        self._stacked = rows.padded(num_rows)
        self._rows: tuple[Row, ...] = ()  # those that `_stacked` holds
        self._numbers = views(torch.zeros(self._layout.size, device=device), self._layout)
        unet = partial(call_unet, batch.pipeline, ())  # of nobody: the next batch is another's
        self._made, self._replay, nbytes = capture(
            lambda: compute_step(unet, self._slots, self._stacked, self._numbers, Guidance()), room
        )
        buffers = (self._slots, self._numbers.packed, *self._stacked)
        self.nbytes = nbytes + sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def __call__(self, batch: Batch, slots: torch.Tensor, rows: StackedRows) -> StepTensors:
        """The step of `slots` [B, S, C, h, w]; the next call overwrites output and model input."""
        num_images, num_slots = slots.shape[:2]
        self._slots[:num_images, :num_slots].copy_(slots)
        self._slots[:num_images, num_slots:].zero_()  # not what a failed image has left there
        if self._rows != batch.rows:
            self._stacked.copy_(rows)
            self._rows = batch.rows
        numbers = batch.numbers(self._layout)
        self._numbers.packed.copy_(numbers.packed, non_blocking=True)
        self._replay()
        if batch.owners:  # not where a model is measured
            rows_total.add("padding", amount=self._layout.rows - len(batch.rows))
        made = self._made
        return StepTensors(
            made.slots[:num_images].clone(), made.output[:num_images], made.model_input
        )


@dataclass
class _Graphs:
    """Those of one model."""

    capture: Capture
    steps: dict[tuple[BatchKey, int], CapturedStep] = field(default_factory=dict)
    eager_calls: Counter[tuple[BatchKey, int]] = field(default_factory=Counter)
    works: bool = True  # False: what this model computes cannot be captured


def make_graphs(settings: Settings, pipelines: PipelineCache) -> Graphs | None:
    """Graphs for the steps of a server; None where they are not wanted or there is no GPU."""
    if not settings.cuda_graphs:
        return None
    if choose_device(settings).type != "cuda":
        if "cuda_graphs" in settings.model_fields_set:
            say_once("SDBENTO_CUDA_GRAPHS needs a GPU: steps are computed eagerly")
        return None
    return Graphs(ROWS_PER_IMAGE * settings.max_batch_size, pipelines, CudaCapture)


class Graphs:
    """The captured steps of all models, of up to `max_rows` rows."""

    def __init__(
        self,
        max_rows: int,
        memory: Memory,
        new_capture: Callable[[], Capture],
        eager_calls: int = EAGER_CALLS,
    ) -> None:
        self._max_rows = bucket(max_rows)
        self._memory = memory
        self._new_capture = new_capture
        self._eager_calls = eager_calls
        self._models: WeakKeyDictionary[Pipeline, _Graphs] = WeakKeyDictionary()

    def find(
        self, batch: Batch, rows: StackedRows, *, at_once: bool = False
    ) -> CapturedStep | None:
        """The captured step for `batch`; None: compute it eagerly. `at_once`: capture it now, if it
        can be captured at all."""
        num_rows = bucket(len(batch.rows))
        if not batch.is_plain or num_rows > self._max_rows or batch.num_slots > MAX_SLOTS:
            return None
        if (model := self._models.get(batch.pipeline)) is None:
            model = self._models[batch.pipeline] = _Graphs(self._new_capture())
        kind = batch.key, num_rows
        if kind in model.steps or not model.works:
            return model.steps.get(kind)
        model.eager_calls[kind] += 1
        if at_once or model.eager_calls[kind] > self._eager_calls:
            self._capture(model, batch, rows, num_rows)
        return model.steps.get(kind)

    def forget(self) -> None:
        """Give the memory of all graphs back, for the device has none left."""
        for pipeline, model in self._models.items():
            self._memory.grow(pipeline, -sum(step.nbytes for step in model.steps.values()))
            for kind in model.steps:
                model.eager_calls[kind] = self._eager_calls - RETRY_AFTER
            model.steps.clear()
            model.capture = self._new_capture()

    def _try_later(self, model: _Graphs, kind: tuple[BatchKey, int]) -> None:
        key, num_rows = kind
        log.info("no memory for a CUDA graph of %d rows of %s", num_rows, key)
        model.eager_calls[kind] = self._eager_calls - RETRY_AFTER

    def _capture(self, model: _Graphs, batch: Batch, rows: StackedRows, num_rows: int) -> None:
        kind = batch.key, num_rows
        try:
            step = CapturedStep(batch, rows, num_rows, model.capture, self._memory.room())
        except NoRoom:
            self._try_later(model, kind)
        except RuntimeError as error:
            if "out of memory" in str(error):  # of the allocator, or of CUDA itself
                self._try_later(model, kind)
            else:
                log.warning("%s cannot be captured and runs eagerly: %s", batch.key.model, error)
                model.works = False
        else:
            self._memory.grow(batch.pipeline, step.nbytes)
            model.steps[kind] = step


class CudaCapture:
    """Captures CUDA graphs whose memory is one pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, work: Callable[[], StepTensors], room: int
    ) -> tuple[StepTensors, Callable[[], None], int]:
        if _warm_up(work) > room:
            raise NoRoom
        before = self._nbytes()
        graph = torch.cuda.CUDAGraph()
        # Where a capture fails, torch leaves its stream the current one, and its pool open.
        with torch.cuda.stream(torch.cuda.current_stream()):
            try:
                # thread_local: the thread that loads models may allocate meanwhile
                with torch.cuda.graph(
                    graph, self._pool, _stream(), capture_error_mode="thread_local"
                ):
                    made = work()
            except Exception:
                self._close_pool()
                raise
        return made, graph.replay, self._nbytes() - before

    def _nbytes(self) -> int:
        """What the pool has taken from the device."""
        segments = torch.cuda.memory_snapshot(self._pool, include_traces=False)
        return sum(segment["total_size"] for segment in segments)

    def _close_pool(self) -> None:
        with suppress(RuntimeError):  # it was closed
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)


@cache
def _stream() -> torch.cuda.Stream:
    """The stream of all captures, and of the calls that warm them up."""
    return torch.cuda.Stream()


def _warm_up(work: Callable[[], StepTensors]) -> int:
    """Run `work` as a capture will; returns the bytes that it needed."""
    current, side = torch.cuda.current_stream(), _stream()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            work()
    finally:
        current.wait_stream(side)
    return torch.cuda.max_memory_allocated() - before
