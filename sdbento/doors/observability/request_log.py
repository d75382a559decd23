"""`RequestLog` gives every request an id, and writes one line of the log about it at its end.

The line says who asked for what, how that ended and how long it took. It has neither prompts nor
URLs of images, unless the operator asks for them, and never a key. It takes the place of BentoML's
own access log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from functools import cached_property

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdbento.doors.bentoml.labels import OTHERS, RouteLabels
from sdbento.errors import OK, Cancelled, MalformedRequest, SDBentoError
from sdbento.metrics import definitions as metrics
from sdbento.metrics.requests import counting
from sdbento.settings import Settings
from sdbento.telemetry import spans
from sdbento.telemetry.request import RequestFacts, handling, request_id

log = logging.getLogger("sdbento.access")

REQUEST_ID = "X-Request-ID"
CLIENT_GONE = 499  # the status where there was nobody any more to send one to
PROBES = ("/livez", "/readyz", "/healthz", "/metrics", "/ping")  # asked every few seconds
# Names the trace of a request that is sampled: W3C's Trace Context, level 2.
TRACERESPONSE = b"traceresponse"
ENDPOINT = "/v2/{endpoint_id}"  # of RunPod, before its own routes
MAX_PATH = 200  # characters of a path that is no route


class RequestLog:
    """ASGI middleware around the Guard; `labels` says which route a path belongs to.

    It counts the POSTs to `image_routes`, each at its end.
    """

    def __init__(
        self,
        app: ASGIApp,
        labels: RouteLabels,
        load_settings: Callable[[], Settings],
        image_routes: Collection[str] = (),
    ) -> None:
        self.app = app
        self._labels = labels
        self._load_settings = load_settings
        self._image_routes = frozenset(image_routes)
        metrics.route.expect(*image_routes)

    @cached_property
    def _log_prompts(self) -> bool:
        return self._load_settings().log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID)
        client, _ = scope.get("client") or (None, None)
        facts = RequestFacts(request_id(given), client=client)
        route = self._labels.label(scope["path"])
        answer = _Answer(send, facts, route)
        began = time.monotonic()
        with handling(facts), counting(self._counted_as(scope, route)) as counted:
            try:
                await self.app(scope, receive, answer)
            except Exception:
                answer.status = answer.status or 500
                raise
            finally:
                counted.end(answer.outcome)
                answer.describe_span()
                self._write(scope, route, answer, time.monotonic() - began)

    def _counted_as(self, scope: Scope, route: str) -> str | None:
        """The route under which metrics count a request for images; None for any other."""
        route = route.removeprefix(ENDPOINT)
        return route if scope["method"] == "POST" and route in self._image_routes else None

    def _write(self, scope: Scope, route: str, answer: _Answer, seconds: float) -> None:
        level = logging.DEBUG if route in PROBES else logging.INFO
        if not log.isEnabledFor(level):
            return
        asked = {"method": scope["method"], "route": route}
        if route == OTHERS:
            asked["path"] = scope["path"][:MAX_PATH]
        told = answer.facts.told(answer.outcome, seconds, with_contents=self._log_prompts)
        fields = {**asked, "status": answer.status or CLIENT_GONE, **told}
        log.log(level, "request", extra={"fields": fields})


class _Answer:
    """A `send` that adds the ids to the answer, and knows how the request has ended."""

    def __init__(self, send: Send, facts: RequestFacts, route: str) -> None:
        self._send = send
        self._route = route
        self.facts = facts
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            added = [(REQUEST_ID.lower().encode(), self.facts.id.encode())]
            if (traceparent := spans.traceparent()) is not None:
                added.append((TRACERESPONSE, traceparent.encode()))
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        elif not message.get("more_body", False):
            self.describe_span()  # which ends with the answer
        await self._send(message)

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        if self.facts.error is not None:
            return self.facts.error.outcome
        if self.status is None or self.status == CLIENT_GONE:
            return Cancelled.outcome
        if self.status < 400:
            return OK
        return MalformedRequest.outcome if self.status < 500 else SDBentoError.outcome

    def describe_span(self) -> None:
        facts = self.facts
        spans.describe(
            {
                "http.route": self._route,
                "enduser.id": facts.key,
                "sdbento.request_id": facts.id,
                "sdbento.outcome": self.outcome,
                **spans.failure(facts.error),
            }
        )
