"""A collector of traces: OTLP over HTTP, as OpenTelemetry's own takes it, on a port of loopback."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from tests.support.serve_in_thread import serve_in_thread

PATIENCE = 60.0  # seconds for a span, which its process sends every few


@dataclass(frozen=True)
class CollectedSpan:
    """A span as it was received. Times in nanoseconds since the epoch."""

    name: str
    trace: str
    id: str
    parent: str
    links: tuple[str, ...]  # the spans that it is linked to
    began: int
    ended: int
    attributes: dict[str, Any]


class Collector:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._spans: list[CollectedSpan] = []
        self.bodies: list[bytes] = []
        self.senders = set[str | None]()  # what they sent as Authorization
        self.url = ""

    def add(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._arrived:
            self.bodies.append(body)
            self._spans += [
                CollectedSpan(
                    name=span.name,
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    links=tuple(link.span_id.hex() for link in span.links),
                    began=span.start_time_unix_nano,
                    ended=span.end_time_unix_nano,
                    attributes={one.key: _value(one.value) for one in span.attributes},
                )
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
            self._arrived.notify_all()

    @property
    def traces(self) -> set[str]:
        with self._arrived:
            return {span.trace for span in self._spans}

    def trace(self, trace: str, *, until: str) -> list[CollectedSpan]:
        """The spans of a trace in the order of their beginning, once one called `until` is there,
        which must be the last to end."""
        give_up = time.monotonic() + PATIENCE
        with self._arrived:
            while True:
                spans = [span for span in self._spans if span.trace == trace]
                if any(span.name == until for span in spans):
                    return sorted(spans, key=lambda span: (span.began, span.ended))
                if not self._arrived.wait(give_up - time.monotonic()):
                    names = [(span.name, span.trace) for span in self._spans]
                    raise AssertionError(f"no {until} in {trace}; there are {names}")


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # its name in http.server
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.add(body)
            collector.senders.add(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_: object) -> None:
            pass

    with serve_in_thread(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
        yield collector


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)
