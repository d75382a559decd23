"""The course of a request through the App: when each part of it began and ended.

It is told where a request ends, however it does: in the request's line of the log, and as spans
below the present one if that is sampled. The engine's thread notes times and does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from opentelemetry.context import get_current

from sdbento.engine.handle import Calls, Handle
from sdbento.engine.trajectory import Stage
from sdbento.outbound.urls import is_url
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.result import RunningRequest
from sdbento.request.schema import GenerateRequest
from sdbento.telemetry import spans
from sdbento.telemetry.request import present_request
from sdbento.url_redaction import without_credentials

# The stages of the engine, by the names of their spans.
STAGES = {Stage.PREPARE: "prepare", Stage.STEP: "steps", Stage.DECODE: "decode"}
NOTHING: spans.Attributes = {}


class Course:
    """One request, from its admission to its end: `with Course(request) as course`, on the event
    loop that serves it. Whoever does the work says how far it has come. Keeps no images."""

    def __init__(self, request: GenerateRequest) -> None:
        self.arrived = time.monotonic()
        self._resolved: float | None = None
        self._handle: Handle | None = None
        self._attributes: dict[str, spans.Value | None] = {}
        # Not looked up at the end: a generator may be closed in another context.
        self._facts = present_request()
        self._parent = get_current()
        if self._facts is not None:
            self._facts.add_contents(
                filter(None, [request.prompt, request.negative_prompt]),
                (without_credentials(url) for url in _sources(request) if is_url(url)),
            )

    def resolved(self, request: ResolvedRequest) -> None:
        """All names are known and all images are here. The models may still have to be loaded."""
        self._resolved = time.monotonic()
        settled = request.settled
        if self._facts is not None:
            self._facts.model = settled.model
            self._facts.num_images += settled.num_images
        width, height = request.size
        self._attributes = {
            "gen_ai.operation.name": "generate_content",
            "gen_ai.output.type": "image",
            "gen_ai.request.model": settled.model,
            "gen_ai.request.choice.count": settled.num_images,
            "gen_ai.request.seed": settled.seed,
            "sdbento.width": width,
            "sdbento.height": height,
            "sdbento.steps": settled.num_inference_steps,
        }

    def begun(self, running: RunningRequest) -> None:
        """The engine has the request."""
        self._handle = running.handle
        self._attributes["sdbento.sampler"] = running.sampler

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        handle = self._handle
        if self._facts is not None and handle is not None and handle.started is not None:
            self._facts.queued = handle.started - self.arrived
        if spans.is_sampled(self._parent):
            self._trace(time.monotonic())

    def _trace(self, now: float) -> None:
        """One span for each part that has begun. One that has not ended ends now."""

        def record(
            name: str, began: float, ended: float | None, attributes: spans.Attributes = NOTHING
        ) -> None:
            ended = now if ended is None else ended
            spans.record(name, began, ended, attributes, self._parent)

        spans.describe(self._attributes, self._parent)
        record("resolve", self.arrived, self._resolved)
        if self._resolved is None:
            return
        submitted = None if self._handle is None else self._handle.submitted
        record("load", self._resolved, submitted)
        if self._handle is None:
            return
        record("queue", self._handle.submitted, self._handle.started)
        for stage, calls in self._handle.calls.items():
            record(STAGES[stage], calls.began, calls.ended, self._of(stage, calls))

    def _of(self, stage: Stage, calls: Calls) -> spans.Attributes:
        """What is told of a stage: its calls, and how much they computed in the company of other
        requests."""
        attributes: dict[str, spans.Value | None] = {
            "sdbento.calls": calls.number,
            "sdbento.call_seconds": round(calls.seconds, 6),
        }
        if stage is Stage.STEP:
            names = ("sdbento.sampler", "sdbento.steps")
            attributes |= {name: self._attributes[name] for name in names}
            attributes["sdbento.rows_per_call"] = round(calls.size / calls.number, 2)
        else:
            attributes["sdbento.images_per_call"] = round(calls.size / calls.number, 2)
        return attributes


def _sources(request: GenerateRequest) -> Iterator[str]:
    """Where the images are that a request brings along."""
    controls = (control.image for control in request.controlnet or ())
    yield from filter(None, (request.image, request.mask_image, *controls))
