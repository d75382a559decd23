"""What every HTTP route shares: body limit, one error shape, disconnects, server-sent events.

`Guard` stands between the network and BentoML, which by itself neither limits JSON bodies, nor
stops work whose client is gone, nor lets a handler choose how an error looks. Knows nothing of
BentoML: it is plain ASGI.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdbento.doors.http.forms import as_json, is_form
from sdbento.errors import (
    Cancelled,
    InvalidParameter,
    MalformedRequest,
    NotFound,
    SDBentoError,
    TooLarge,
    Unavailable,
    classify,
)
from sdbento.request.parse import parse
from sdbento.request.schema import GenerateRequest
from sdbento.settings import Settings

log = logging.getLogger(__name__)

KEEP_ALIVE = 15.0  # seconds of silence after which a stream says that it is still there

P = ParamSpec("P")
T = TypeVar("T")


class Failure:
    """Where a handler leaves the error that its request is to be answered with."""

    error: SDBentoError | None = None


_failure: ContextVar[Failure] = ContextVar("failure")


def error_response(error: SDBentoError) -> JSONResponse:
    """The one error shape, with Retry-After where the error knows it."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return JSONResponse(error.to_body(), status_code=error.status, headers=headers)


def _fail(exc: Exception) -> SDBentoError:
    error = classify(exc)
    if error.type == "internal_error":
        log.error("%s", error.message, exc_info=exc)
    _failure.get().error = error
    return error


def reported(handler: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Let the Guard answer with whatever `handler` raises."""

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except Exception as exc:
            _fail(exc)
            return Response()  # type: ignore[return-value]  # the Guard replaces it

    return wrapper


def reported_stream(
    handler: Callable[P, AsyncGenerator[str, None]],
) -> Callable[P, AsyncGenerator[str, None]]:
    """As `reported`, for a handler that yields server-sent events.

    What it raises before the first event is the answer's status; later, it is an `error` event.
    """

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[str, None]:
        started = False
        try:
            async with aclosing(handler(*args, **kwargs)) as events:
                async for event in events:
                    started = True
                    yield event
        except Exception as exc:
            error = _fail(exc)
            if started:
                yield _server_sent({"event": "error", **error.to_body()})

    return wrapper


async def server_sent_events(
    events: AsyncGenerator[dict[str, Any], None],
) -> AsyncGenerator[str, None]:
    """Dicts as server-sent events named by their "event", and a comment after long silence."""
    async with aclosing(events):
        while True:
            upcoming = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait({upcoming}, timeout=KEEP_ALIVE))[0]:
                    yield ": keep-alive\n\n"
                event = upcoming.result()
            finally:
                await _cancelled(upcoming)
            if event is None:
                return
            yield _server_sent(event)


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel `task` if it is not done, and see it end."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _server_sent(event: dict[str, Any]) -> str:
    data = json.dumps(event, default=BaseModel.model_dump)
    return f"event: {event['event']}\ndata: {data}\n\n"


class Guard:
    """ASGI middleware around everything that is served.

    A body over the limit is a 413. What is posted to the paths of `request_models` is such a
    request: a form, or else JSON whatever its Content-Type says. It is refused here when it is not
    one, so that BentoML only ever sees valid requests. When the client goes away the handler is
    cancelled.
    """

    def __init__(
        self,
        app: ASGIApp,
        load_settings: Callable[[], Settings],
        request_models: Mapping[str, type[GenerateRequest]],
    ) -> None:
        self.app = app
        self._max_body_bytes = load_settings().max_body_bytes
        self._request_models = request_models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        failure = Failure()
        _failure.set(failure)
        answer = _OneErrorShape(scope, send, failure, ours=scope["path"] in self._request_models)
        try:
            body = await self._read_body(scope, receive)
            model = self._request_models.get(scope["path"])
            if model is not None and scope["method"] == "POST":
                headers = Headers(scope=scope)
                if is_form(headers):
                    body = await as_json(headers, body)
                parse(body, model)
                scope = _as_json(scope)
        except SDBentoError as error:
            await error_response(error)(scope, receive, send)
            return
        except _ClientGone:
            return
        if not await _until_disconnected(self.app, scope, body, receive, answer):
            log.info("the client of %s went away", scope["path"])
            # Nobody reads it but BentoML's access log.
            with suppress(OSError):
                await error_response(Cancelled("the client went away"))(scope, receive, send)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._max_body_bytes
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(int(declared), limit)
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
            if size > limit:
                raise _too_large(size, limit)
        return b"".join(chunks)


class _ClientGone(Exception):
    """The client left before it had sent its request."""


def _too_large(size: int, limit: int) -> TooLarge:
    return TooLarge(f"the body may have at most {limit} bytes; given: {size} or more")


def _as_json(scope: Scope) -> Scope:
    """The scope with a JSON content type, so that `curl -d` needs no header."""
    copy = dict(scope, headers=list(scope["headers"]))
    headers = MutableHeaders(scope=copy)
    headers["content-type"] = "application/json"
    del headers["content-length"]  # a form has become another body
    return copy


async def _until_disconnected(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> bool:
    """Run `app` on a body that was read already; False when the client left before its end."""
    gone = asyncio.ensure_future(_disconnect(receive))
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await asyncio.shield(gone)

    handling = asyncio.ensure_future(app(scope, replay, send))
    try:
        await asyncio.wait({handling, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        cancelled = not handling.done() and handling.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await handling
    return not cancelled


async def _disconnect(receive: Receive) -> Message:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


class _OneErrorShape:
    """A `send` that replaces answers which are errors but do not look like ours."""

    def __init__(self, scope: Scope, send: Send, failure: Failure, *, ours: bool) -> None:
        self._scope = scope
        self._send = send
        self._failure = failure
        self._ours = ours
        self._replaced_status: int | None = None
        self._allow: str | None = None
        self._body = b""
        self._passing = False

    async def __call__(self, message: Message) -> None:
        if self._passing:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] == "http.response.body" and self._replaced_status is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._replace()

    async def _start(self, message: Message) -> None:
        foreign = message["status"] >= 400 and (self._ours or not _is_json(message))
        if self._failure.error is None and not foreign:
            self._passing = True
            await self._send(message)
        else:
            self._replaced_status = message["status"]
            self._allow = Headers(raw=message["headers"]).get("allow")

    async def _replace(self) -> None:
        assert self._replaced_status is not None
        error = self._failure.error or self._unrouted(self._replaced_status)
        response = error_response(error or _translate(self._replaced_status, self._body))
        if self._allow is not None:
            response.headers["Allow"] = self._allow
        await self._send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "headers": response.raw_headers,
            }
        )
        await self._send({"type": "http.response.body", "body": response.body})

    def _unrouted(self, status: int) -> SDBentoError | None:
        """What to say of a request that no route took."""
        path = self._scope["path"][:80]
        if status == 404:
            return NotFound(f"there is no {path}; the routes are listed at /")
        if status == 405:
            error = MalformedRequest(
                f"{path} takes {self._allow or 'others'}, not {self._scope['method']}"
            )
            error.status = status
            return error
        return None


def _is_json(message: Message) -> bool:
    return Headers(raw=message["headers"]).get("content-type", "").startswith("application/json")


def _translate(status: int, body: bytes) -> SDBentoError:
    """An error of ours for a bare one of the framework, with its status kept."""
    text = body.decode("utf-8", "replace").strip() or HTTPStatus(status).phrase
    kinds = {400: MalformedRequest, 404: NotFound, 422: InvalidParameter, 503: Unavailable}
    kind = kinds.get(status, SDBentoError if status >= 500 else MalformedRequest)
    error = kind(text[:500])
    error.status = status
    return error
