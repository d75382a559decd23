"""The first cost curves of a model: small measurements for the engine's idle time.

They begin when the server is ready, since nothing waits for them: until a size is measured its cost
is guessed, and serving measures the rest. The cost model discards the first timing of each row
count: work done once for a shape (cuDNN plans, page faults) is done here, on the engine's thread.
Small sizes come first: they tell whether measuring the model's own size would keep a request
waiting. At last each row count is called once so that it is captured, where steps are (`graphs`):
the largest first, whose memory serves the smaller ones as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from sdbento.catalog.families import VAE_FACTOR
from sdbento.catalog.specs import ModelSpec
from sdbento.engine.cost import ENOUGH, CostModel
from sdbento.engine.trajectory import BatchKey, Runner, Stage
from sdbento.models.cache import PipelineCache
from sdbento.models.pipeline import Pipeline

BUDGET = 10.0  # seconds of idle time
LONGEST = 0.5  # seconds of one call, for which a request may have to wait; thrice that to capture
SMALLEST = 8  # latents: the side at which the measuring begins


class Calibration:
    """Of one model at its own size, up to `max_rows` rows. Used on the engine's thread only."""

    def __init__(
        self,
        spec: ModelSpec,
        pipelines: PipelineCache,
        runner: Runner,
        cost: CostModel,
        max_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._key = BatchKey(spec.name, spec.height // VAE_FACTOR, spec.width // VAE_FACTOR)
        self._pipelines = pipelines
        self._runner = runner
        self._cost = cost
        self._max_rows = max_rows
        self._clock = clock

    def compile(self, pipeline: Pipeline) -> None:
        """Let the UNet be compiled, where that is enabled; takes long."""
        if pipeline.compiled is not None:
            call = partial(self._runner.measure, pipeline, self._key)
            pipeline.compiled.compile(call, self._max_rows)

    def measurements(self) -> Iterator[None]:
        """One call for each `next`, until all is measured, the time is up or the model is evicted.

        A call that is expected to take longer than LONGEST, or than the time left, is left out.
        """
        left = BUDGET
        for key, stage, size, num_calls, capture in self._calls():
            for _ in range(num_calls):
                if self._cost.seconds(key, stage, size) > min(LONGEST, left):
                    break
                lease = self._pipelines.lease_if_resident(self._spec)
                if lease is None:
                    return
                began = self._clock()
                with lease as pipeline:
                    seconds = self._measure(pipeline, key, stage, size, capture=capture)
                left -= self._clock() - began
                self._cost.observe(key, stage, size, seconds)
                yield

    def _calls(self) -> Iterator[tuple[BatchKey, Stage, int, int, bool]]:
        """Key, stage, size, number of calls, and whether they are captured: powers of two are
        timed, all row counts warmed up."""
        for key in self._smaller_keys():
            yield key, Stage.STEP, 1, 2, False
            yield key, Stage.DECODE, 1, 2, False
        for rows in self._powers():
            yield self._key, Stage.STEP, rows, 1 + ENOUGH, False
        yield self._key, Stage.DECODE, 1, 1 + ENOUGH, False
        for rows in range(self._max_rows, 0, -1):
            yield self._key, Stage.STEP, rows, 1, True

    def _smaller_keys(self) -> list[BatchKey]:
        """Half the model's size, a quarter, ...; the smallest first."""
        height, width = self._key.latent_height // 2, self._key.latent_width // 2
        keys: list[BatchKey] = []
        while min(height, width) >= SMALLEST:
            keys.insert(0, BatchKey(self._spec.name, height, width))
            height, width = height // 2, width // 2
        return keys

    def _powers(self) -> list[int]:
        return [2**i for i in range(self._max_rows.bit_length())]

    def _measure(
        self, pipeline: Pipeline, key: BatchKey, stage: Stage, size: int, *, capture: bool
    ) -> float:
        if stage is Stage.DECODE:
            return self._runner.measure_decode(pipeline, key)
        return self._runner.measure(pipeline, key, size, capture=capture)
