"""Sends calls with httpx, by blocking or by awaiting, and sends them again where that may help.

Errors of httpx do not leave this file: see `errors.no_answer`. Both transports may be used by many
threads, or tasks, at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from sdbento import __version__
from sdbento.client.calls import Call
from sdbento.client.errors import error_of, no_answer
from sdbento.client.events import message_in
from sdbento.client.retries import Retries
from sdbento.errors import SDBentoError

T = TypeVar("T")
R = TypeVar("R")

CONNECT_TIMEOUT = 5.0  # seconds
# A server closes idle connections, uvicorn after 5 s. A call on one that is just being closed would
# fail without a word whether it was heard.
LIMITS = httpx.Limits(max_connections=100, keepalive_expiry=3.0)


@dataclass(frozen=True)
class Options:
    """Where the server is and how to ask it.

    timeout: seconds to wait for an answer, None: for ever. Raises ValueError for an address or key
    that cannot be one.
    """

    base_url: str
    api_key: str | None
    timeout: float | None
    max_retries: int

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url is not valid: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("base_url must begin with http:// or https:// and a host")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII, without a line break")
        if self.max_retries < 0:
            raise ValueError(f"max_retries must not be negative: {self.max_retries}")

    def for_httpx(self) -> dict[str, Any]:
        agent = f"sdbento-client/{__version__}"
        return {"base_url": self.base_url, "headers": {"User-Agent": agent}, "limits": LIMITS}

    def of_request(self, call: Call[Any]) -> dict[str, Any]:
        """The arguments that build httpx's request of `call`."""
        wait = None if self.timeout is None else max(self.timeout, call.patience)
        return {
            "method": call.method,
            "url": call.path,
            "params": call.params,
            "content": call.body,
            "headers": self._headers(call),
            # A call waits for a free connection as long as it has to.
            "timeout": httpx.Timeout(wait, connect=CONNECT_TIMEOUT, pool=None),
        }

    def _headers(self, call: Call[Any]) -> dict[str, str]:
        headers = {}
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        if self.api_key and not call.foreign:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def retries(self, call: Call[Any]) -> Retries:
        return Retries(self.max_retries, harmless=call.harmless)


class Transport:
    """Sends calls and blocks until they are answered."""

    def __init__(self, options: Options, transport: httpx.BaseTransport | None) -> None:
        self._options = options
        self._http = httpx.Client(transport=transport, **options.for_httpx())

    def close(self) -> None:
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """The result of `call`. Raises SDBentoError."""
        return self._repeated(call, self.send_once)

    def send_once(self, call: Call[T]) -> T:
        return call.result(self._begin(call, stream=False))

    def messages(self, call: Call[Any]) -> Generator[dict[str, Any], None, None]:
        """The messages that `call` is answered with, each when it comes. Raises SDBentoError.

        The call is sent when the first is asked for; closing the generator ends it.
        """
        with closing(self._repeated(call, self._open)) as response:
            try:
                for line in response.iter_lines():
                    if (message := message_in(line)) is not None:
                        yield message
            except httpx.RequestError as error:
                raise no_answer(error) from error

    def _repeated(self, call: Call[T], attempt: Callable[[Call[T]], R]) -> R:
        retries = self._options.retries(call)
        while True:
            try:
                return attempt(call)
            except SDBentoError as error:
                if (pause := retries.pause_after(error)) is None:
                    raise
            time.sleep(pause)

    def _open(self, call: Call[Any]) -> httpx.Response:
        response = self._begin(call, stream=True)
        if not response.is_success:
            raise error_of(response)
        return response

    def _begin(self, call: Call[Any], *, stream: bool) -> httpx.Response:
        try:
            request = self._http.build_request(**self._options.of_request(call))
            response = self._http.send(request, stream=stream)
            if not response.is_success:
                response.read()  # the error, which is not streamed
            return response
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise no_answer(error) from error


class AsyncTransport:
    """As Transport, but awaits. Cancelling a task that waits ends its call."""

    def __init__(self, options: Options, transport: httpx.AsyncBaseTransport | None) -> None:
        self._options = options
        self._http = httpx.AsyncClient(transport=transport, **options.for_httpx())

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        return await self._repeated(call, self.send_once)

    async def send_once(self, call: Call[T]) -> T:
        response = await self._begin(call, stream=False)
        return await asyncio.to_thread(call.result, response)  # which may hold large images

    async def messages(
        self, make_call: Callable[[], Call[Any]]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """As Transport.messages; `make_call` may read and encode images, and is run on a thread."""
        call = await asyncio.to_thread(make_call)
        async with aclosing(await self._repeated(call, self._open)) as response:
            try:
                async for line in response.aiter_lines():
                    if (message := message_in(line)) is not None:
                        yield message
            except httpx.RequestError as error:
                raise no_answer(error) from error

    async def _repeated(self, call: Call[T], attempt: Callable[[Call[T]], Awaitable[R]]) -> R:
        retries = self._options.retries(call)
        while True:
            try:
                return await attempt(call)
            except SDBentoError as error:
                if (pause := retries.pause_after(error)) is None:
                    raise
            await asyncio.sleep(pause)

    async def _open(self, call: Call[Any]) -> httpx.Response:
        response = await self._begin(call, stream=True)
        if not response.is_success:
            raise error_of(response)
        return response

    async def _begin(self, call: Call[Any], *, stream: bool) -> httpx.Response:
        try:
            request = self._http.build_request(**self._options.of_request(call))
            response = await self._http.send(request, stream=stream)
            if not response.is_success:
                await response.aread()
            return response
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise no_answer(error) from error
