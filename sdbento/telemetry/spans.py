"""Spans of OpenTelemetry, for requests that are sampled; for the others nothing is done at all.

Where spans go is not known here: whoever starts the process says so by `send_by`. Times are in
seconds of `time.monotonic`, so that what was timed on another thread can be told afterwards. A span
has neither prompts nor URLs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sdbento.errors import SDBentoError, classify

Value = str | bool | int | float
Attributes = Mapping[str, Value | None]  # those that are None are left out

TRACEPARENT = "traceparent"
_W3C = TraceContextTextMapPropagator()


_tracer: trace.Tracer = trace.NoOpTracer()


def send_by(provider: trace.TracerProvider) -> None:
    """Let the spans of this process, from now on, go where those of `provider` go."""
    global _tracer
    _tracer = provider.get_tracer("sdbento")


def is_sampled(context: Context | None = None) -> bool:
    """Whether somebody will look at the trace that a context belongs to; None: the present one."""
    return trace.get_current_span(context).get_span_context().trace_flags.sampled


def traceparent() -> str | None:
    """The present span as other programs are told of it, if it is sampled: W3C's Trace Context."""
    if not is_sampled():
        return None
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier[TRACEPARENT]


def describe(attributes: Attributes, context: Context | None = None) -> None:
    """Add attributes to the span of a context, unless that has ended; None: the present one."""
    span = trace.get_current_span(context)
    if is_sampled(context) and span.is_recording():
        span.set_attributes(_given(attributes))


def record(
    name: str, began: float, ended: float, attributes: Attributes, parent: Context | None = None
) -> None:
    """A span for what has happened between `began` and `ended`, in a context that is sampled."""
    since_epoch = time.time() - time.monotonic()
    span = _tracer.start_span(
        name,
        parent,
        attributes=_given(attributes),
        start_time=_nanoseconds(since_epoch + began),
    )
    span.end(_nanoseconds(since_epoch + max(began, ended)))


@contextmanager
def spanning(name: str, attributes: Attributes) -> Iterator[None]:
    """A span for what the block does."""
    if not is_sampled():
        yield
        return
    with _started(name, None, SpanKind.INTERNAL, attributes):
        yield


@contextmanager
def continuing(
    caused_by: str | None, name: str, attributes: Attributes, kind: SpanKind = SpanKind.CONSUMER
) -> Iterator[None]:
    """A span for work that was asked for under another span, whose `traceparent` was kept; None:
    no span. It is that one's child, and linked to it, as OpenTelemetry has it for messages.
    """
    context = _W3C.extract({TRACEPARENT: caused_by}, Context()) if caused_by else Context()
    if not is_sampled(context):
        yield
        return
    with _started(name, context, kind, attributes):
        yield


def failure(error: SDBentoError | None) -> Attributes:
    """How something has ended, by OpenTelemetry's name for it."""
    return {"error.type": None if error is None else error.type}


@contextmanager
def _started(
    name: str, context: Context | None, kind: SpanKind, attributes: Attributes
) -> Iterator[Span]:
    cause = trace.get_current_span(context).get_span_context()
    with _tracer.start_as_current_span(
        name,
        context,
        kind=kind,
        attributes=_given(attributes),
        links=[Link(cause)] if kind is SpanKind.CONSUMER else None,
        # An exception's text may quote what the client has sent.
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as exc:
            error = classify(exc)
            span.set_attributes(_given(failure(error)))
            if error.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            raise


def _given(attributes: Attributes) -> dict[str, Value]:
    return {name: value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
