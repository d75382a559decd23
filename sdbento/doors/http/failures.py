"""Errors as HTTP answers: one shape for all of a door's, whoever raised them.

What a handler of BentoML raises becomes an answer in a shape of BentoML's, most often a bare 500.
So `guarded` notes the error of a handler, and `OneErrorShape`, which the Guard puts around every
answer, sends that error in place of the answer. It also translates the errors of BentoML and
Starlette themselves: 404 where there is no route, 405, 503 of /readyz.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, ParamSpec, TypeVar

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Scope, Send

from sdbento.doors.error_shape import OURS, ErrorShape, error_response
from sdbento.errors import (
    InvalidParameter,
    MalformedRequest,
    NotFound,
    SDBentoError,
    Unavailable,
    classify,
)
from sdbento.telemetry.request import note_error

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Failure:
    """The error that one request is to be answered with, once its handler has raised one."""

    error: SDBentoError | None = None


_failure: ContextVar[Failure] = ContextVar("failure")


def watch() -> Failure:
    """Where the handlers that are called from here on, by this task, note their error."""
    failure = Failure()
    _failure.set(failure)
    return failure


def note(exc: Exception) -> SDBentoError:
    """Answer the present request with `exc`, or with what a client may know of it."""
    error = classify(exc)
    if error.type == "internal_error":
        log.error("%s", error.message, exc_info=exc)
    _failure.get().error = error
    note_error(error)
    return error


def guarded(
    handler: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let the Guard answer with whatever `handler` raises."""

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except Exception as exc:
            note(exc)
            return Response()  # type: ignore[return-value]  # OneErrorShape replaces it

    return wrapper


class OneErrorShape:
    """A `send` that replaces an answer when the handler failed or a framework refused the request.

    `own_path`: no error of a framework passes, not even in JSON. On other paths a JSON error is
    the route's own answer. `shape` is that of the door which the path belongs to.
    """

    def __init__(
        self,
        scope: Scope,
        send: Send,
        failure: Failure,
        *,
        own_path: bool,
        shape: ErrorShape = OURS,
    ) -> None:
        self._scope = scope
        self._send = send
        self._failure = failure
        self._own_path = own_path
        self._shape = shape
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
        foreign = message["status"] >= 400 and (self._own_path or not _is_json(message))
        if self._failure.error is None and not foreign:
            self._passing = True
            await self._send(message)
        else:
            self._replaced_status = message["status"]
            self._allow = Headers(raw=message["headers"]).get("allow")

    async def _replace(self) -> None:
        assert self._replaced_status is not None
        if self._replaced_status == 405 and self._scope["method"] == "OPTIONS":
            await self._send_methods()
            return
        error = self._failure.error or self._unrouted(self._replaced_status)
        error = error or _translate(self._replaced_status, self._body)
        note_error(error)
        response = error_response(error, self._shape)
        if self._allow is not None:
            response.headers["Allow"] = self._allow
        await self._send_whole(response)

    async def _send_methods(self) -> None:
        """OPTIONS of a route that says nothing of it: what the route takes. Clients ask so whether
        it is there (SillyTavern's ping)."""
        methods = ", ".join(filter(None, [self._allow, "OPTIONS"]))
        await self._send_whole(Response(status_code=204, headers={"Allow": methods}))

    async def _send_whole(self, response: Response) -> None:
        start = {"status": response.status_code, "headers": response.raw_headers}
        await self._send({"type": "http.response.start"} | start)
        await self._send({"type": "http.response.body", "body": response.body})

    def _unrouted(self, status: int) -> SDBentoError | None:
        """The error for a request that no route accepts."""
        path = self._scope["path"][:80]
        if status == 404:
            return NotFound(f"there is no {path}; the routes are listed at /docs")
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
    """An error of ours for a framework's, with its status and its text."""
    text = body.decode("utf-8", "replace").strip() or HTTPStatus(status).phrase
    kinds = {400: MalformedRequest, 404: NotFound, 422: InvalidParameter, 503: Unavailable}
    kind = kinds.get(status, SDBentoError if status >= 500 else MalformedRequest)
    error = kind(text[:500])
    error.status = status
    return error
