"""Spans, as OpenTelemetry's own SDK receives them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from sdbento.errors import GenerationFailed, InvalidParameter
from sdbento.telemetry import spans

CAUSE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0{}"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(spans, "_tracer", trace.NoOpTracer())
    spans.send_by(provider)
    yield exporter
    provider.shutdown()


def by_name(exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exported.get_finished_spans()}


def test_parts_of_a_job_are_below_what_has_caused_it(exported: InMemorySpanExporter) -> None:
    began = time.monotonic()
    with spans.continuing(CAUSE.format(1), "job", {"a": 1, "b": None}):
        spans.describe({"c": True})
        spans.record("queue", began - 2, began - 1, {})
        with spans.spanning("encode", {"d": 0.5}):
            told = spans.traceparent()
    found = by_name(exported)
    job, queue, encode = found["job"], found["queue"], found["encode"]
    assert job.context is not None and encode.context is not None and job.parent is not None
    assert trace.format_trace_id(job.context.trace_id) in CAUSE
    assert trace.format_span_id(job.parent.span_id) in CAUSE
    assert [link.context for link in job.links] == [job.parent]
    assert (job.kind, job.attributes) == (SpanKind.CONSUMER, {"a": 1, "c": True})
    assert queue.parent == encode.parent == job.context
    assert queue.start_time is not None and queue.end_time is not None
    assert queue.end_time - queue.start_time == pytest.approx(1e9, abs=1e3)
    assert told is not None and trace.format_span_id(encode.context.span_id) in told


@pytest.mark.parametrize("cause", [None, CAUSE.format(0), "no traceparent"])
def test_what_nobody_looks_at_makes_no_spans(
    exported: InMemorySpanExporter, cause: str | None
) -> None:
    with spans.continuing(cause, "job", {}), spans.spanning("encode", {}):
        spans.describe({"a": 1})
        assert spans.traceparent() is None and not spans.is_sampled()
    assert by_name(exported) == {}


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (InvalidParameter("a secret"), "invalid_parameter", StatusCode.UNSET),
        (GenerationFailed("a secret"), "generation_failed", StatusCode.ERROR),
        (ZeroDivisionError("a secret"), "internal_error", StatusCode.ERROR),
    ],
)
def test_a_failure_is_told_by_its_kind_alone(
    exported: InMemorySpanExporter, error: Exception, kind: str, status: StatusCode
) -> None:
    with pytest.raises(type(error)), spans.continuing(CAUSE.format(1), "job", {}):
        raise error
    job = by_name(exported)["job"]
    assert job.attributes == {"error.type": kind} and job.status.status_code is status
    assert "secret" not in job.to_json()


def test_without_a_provider_a_sampled_request_is_none_the_worse() -> None:
    with spans.continuing(CAUSE.format(1), "job", {}):
        spans.record("queue", 0.0, 1.0, {})
