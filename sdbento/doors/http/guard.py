"""`Guard` stands between the network and BentoML, and does for every route what BentoML does not.

BentoML by itself asks for no key, reads JSON bodies of any length, lets a handler work on when its
client is gone, and answers bad requests in shapes of its own. The Guard is plain ASGI and knows
nothing of BentoML.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import cached_property
from types import MappingProxyType

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdbento.access.caller import acting_for
from sdbento.doors.error_shape import OURS, ErrorShape, error_response
from sdbento.doors.http import failures
from sdbento.doors.http.failures import OneErrorShape
from sdbento.doors.http.forms import body_as_json, is_form
from sdbento.doors.http.gate import Gate
from sdbento.doors.http.json_bounds import check
from sdbento.doors.network.bodies import Bodies, ClientGone, Share
from sdbento.doors.network.parsers import parsed
from sdbento.errors import Cancelled, UnsupportedEncoding
from sdbento.request.parse import parse
from sdbento.request.schema import GenerateRequest
from sdbento.settings import Settings
from sdbento.telemetry.request import note_caller

log = logging.getLogger(__name__)

REQUEST = "sdbento.request"  # the key of the parsed request in the ASGI scope
# Headers that pages of others may read.
READABLE = ("Retry-After", "X-Request-ID", "X-Seed", "X-SDBento-Model", "X-SDBento-Warnings")


async def parsed_request(request: Request, _: object = None) -> GenerateRequest:
    """The request that the Guard has parsed, for a handler of one of its `request_models`."""
    parsed: GenerateRequest = request.scope[REQUEST]
    return parsed


class Guard:
    """ASGI middleware around everything that is served.

    A request without a key, where one is needed, is answered before its body is read; the others
    are handled on behalf of their key (`current_caller`). Only a POST to a path that `takes_body`
    has a body; what comes elsewhere is not kept. A body over a limit is answered with 413, and with
    503 where there are too many at once. The body of a POST to a path of `request_models` is parsed
    here, and only here, as a request of that class; `parsed_request` returns it. It is a form, or
    else JSON whatever its Content-Type says. When the client goes away, the handler is cancelled.
    Errors have the shape of the door that a path belongs to, by its prefix in `error_shapes`. Files
    directly below `open_prefixes` need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        load_settings: Callable[[], Settings],
        request_models: Mapping[str, type[GenerateRequest]],
        error_shapes: Mapping[str, ErrorShape] = MappingProxyType({}),
        open_prefixes: tuple[str, ...] = (),
        takes_body: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.app = app
        self._load_settings = load_settings
        self._request_models = request_models
        self._error_shapes = error_shapes
        self._open_prefixes = open_prefixes
        self._takes_body = takes_body

    # At the first request, not before: a bad setting is told by the service when it starts, which
    # it could not if the application in which it starts had failed already.

    @cached_property
    def _settings(self) -> Settings:
        return self._load_settings()

    @cached_property
    def _gate(self) -> Gate:
        return Gate(self._settings, self._open_prefixes)

    @cached_property
    def _bodies(self) -> Bodies:
        return Bodies(self._settings.max_body_bytes)

    @cached_property
    def _answer(self) -> ASGIApp:
        return _with_cors(self._handle, self._settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":  # no door speaks it: nothing may come in unseen
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = _without_last_slash(scope)
        own_path = scope["path"] in self._request_models
        shape = self._shape_of(scope["path"])
        answer = OneErrorShape(scope, send, failures.watch(), own_path=own_path, shape=shape)
        with ExitStack() as held:
            try:
                caller = await self._gate.admit(scope)
                note_caller(caller.name, caller.address)
                held.enter_context(acting_for(caller))
                share = held.enter_context(self._bodies.share(caller.owner))
                body = await self._read_body(scope, receive, share)
                if own_path and scope["method"] == "POST":
                    scope, body = await self._parse(scope, body), b""  # it may hold large images
            except ClientGone:
                return
            except Exception as exc:
                by_script = Headers(scope=scope).get("x-requested-with") == "XMLHttpRequest"
                error = error_response(failures.note(exc), shape, to_script=by_script)
                await error(scope, receive, send)
                return
            finished = await _until_disconnected(self.app, scope, body, receive, answer)
        if not finished:
            log.info("the client of %r went away", scope["path"])
            # Nobody gets this answer, but logs, metrics and traces take note of its status.
            with suppress(OSError):
                gone = failures.note(Cancelled("the client went away"))
                await error_response(gone)(scope, receive, send)

    def _shape_of(self, path: str) -> ErrorShape:
        shapes = (shape for prefix, shape in self._error_shapes.items() if path.startswith(prefix))
        return next(shapes, OURS)

    async def _read_body(self, scope: Scope, receive: Receive, share: Share) -> bytes:
        """What a handler may parse. Raises SDBentoError, ClientGone."""
        if self._gate.is_open(scope):
            return b""
        headers = Headers(scope=scope)
        if scope["method"] != "POST" or not self._takes_body(scope["path"]):
            await share.discard(headers, receive)
            return b""
        if (coding := headers.get("content-encoding", "identity")) != "identity":
            raise UnsupportedEncoding(f"the body may not be compressed; given: {coding[:80]}")
        body = await share.read(headers, receive)
        if not is_form(headers):  # `forms` checks the parts of one
            await parsed(check, body)
        return body

    async def _parse(self, scope: Scope, body: bytes) -> Scope:
        """The scope with the request that `body` stands for. Raises MalformedRequest, TooLarge,
        InvalidParameter."""
        text = await body_as_json(Headers(scope=scope), body)
        if text is not body:  # a form has been made into JSON
            await parsed(check, text)
        model = self._request_models[scope["path"]]
        request = await parsed(parse, text, model)
        copy = dict(scope, headers=list(scope["headers"])) | {REQUEST: request}
        # BentoML refuses some content types, whether it reads the body or not.
        changed = MutableHeaders(scope=copy)
        changed["content-type"] = "application/json"
        del changed["content-length"]
        return copy


def _with_cors(app: ASGIApp, origins: str) -> ASGIApp:
    """`app`, whose answers pages from these origins may read; "" for none, "*" for all.

    What a browser remembers of its user (Basic) goes along from named origins only.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins.split(","),
        allow_methods=["GET", "POST", "HEAD", "OPTIONS"],
        allow_headers=["*"],
        allow_credentials="*" not in origins,
        expose_headers=READABLE,
    )


def _without_last_slash(scope: Scope) -> Scope:
    """Starlette redirects from `/models/` to `/models`, which not all clients follow."""
    path = scope["path"].rstrip("/")
    return dict(scope, path=path) if path else scope


async def _until_disconnected(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> bool:
    """Run `app` with `body`, which has been received already. False when the client left before the
    end of the answer.

    After the end, servers tell of a disconnect, too; what `app` still has to do then is its own.
    """
    answered = False
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await asyncio.shield(gone)

    async def answer(message: Message) -> None:
        nonlocal answered
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        answered = answered or last
        await send(message)

    handling = asyncio.ensure_future(app(scope, replay, answer))
    try:
        await asyncio.wait({handling, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        cancelled = not answered and not handling.done() and handling.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await handling
    return not cancelled


async def _wait_for_disconnect(receive: Receive) -> Message:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message
