"""A client of the server for Python, blocking and async; it needs neither torch nor BentoML."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from functools import partial
from typing import Self, Unpack

import httpx

from sdbento.client import calls
from sdbento.client.answers import Generation, Model, Sampler
from sdbento.client.events import check_told, to_batch
from sdbento.client.fields import EditFields, Fields, ImageInput
from sdbento.client.jobs import AsyncJobs, Jobs
from sdbento.client.streams import AsyncStream, Stream
from sdbento.client.transport import AsyncTransport, Options, Transport
from sdbento.errors import SDBentoError
from sdbento.live.batch import Batch
from sdbento.live.stats import Stats

BASE_URL = "http://localhost:3000"
TIMEOUT = 660.0  # seconds; a server with default settings gives a request up after 600
MAX_RETRIES = 2


class Client:
    """A server. May be used by many threads at a time; `close` it, or use it in `with`.

    timeout: seconds to wait for an answer, None: for ever; longer where a request's own `timeout`
    is. max_retries: how often a call is sent again. That is done where it did not reach the server,
    or was refused for the moment (429, 503); then after the seconds that the server tells.
    transport: in place of httpx's own, as for certificates.

    All methods raise SDBentoError: the server's own errors (`sdbento.errors`) and those of
    `sdbento.client.errors`. Those that take images also raise OSError for a file that cannot be
    read, and TypeError for what is no image.
    """

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = TIMEOUT,
        max_retries: int = MAX_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        options = Options(base_url, api_key, timeout, max_retries)
        self._transport = Transport(options, transport)
        self.jobs = Jobs(self._transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def generate(self, prompt: str, **fields: Unpack[Fields]) -> Generation:
        """Make images. A field that is unknown or out of bounds is refused before it is sent."""
        return self._transport.send(calls.generate(prompt, fields))

    def edit(
        self,
        image: ImageInput,
        prompt: str,
        mask: ImageInput | None = None,
        **fields: Unpack[EditFields],
    ) -> Generation:
        """Make images out of `image`: all of it anew, or what is white in `mask`."""
        return self.generate(prompt, image=image, mask_image=mask, **fields)

    def stream(self, prompt: str, **fields: Unpack[Fields]) -> Stream:
        """Make images and tell what happens; `preview_every` asks for previews."""
        call = calls.generate_stream(prompt, fields)
        return Stream(self._transport.messages(call), fields.get("num_images", 1))

    def models(self) -> list[Model]:
        """What `model` can name."""
        return self._transport.send(calls.models())

    def samplers(self) -> list[Sampler]:
        """What `scheduler` can name."""
        return self._transport.send(calls.samplers())

    def stats(self) -> Stats:
        """What runs on the server, in numbers."""
        return self._transport.send(calls.stats())

    def batch(self) -> Generator[Batch, None, None]:
        """What runs on the server, as often as that changes, until the generator is closed. Raises
        NotConnected when the server is gone. Each stream ends after a while: then it asks again."""
        while True:
            batch = None
            with closing(self._transport.messages(calls.batch())) as messages:
                for message in messages:
                    yield (batch := to_batch(message))
            check_told(batch)

    def ready(self) -> bool:
        """Whether requests can be sent now: the server is there and has loaded its model."""
        try:
            return self._transport.send_once(calls.ready())
        except SDBentoError as error:
            return _not_ready(error)


class AsyncClient:
    """As Client, for asyncio. Cancelling a task that waits stops its request on the server."""

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = TIMEOUT,
        max_retries: int = MAX_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        options = Options(base_url, api_key, timeout, max_retries)
        self._transport = AsyncTransport(options, transport)
        self.jobs = AsyncJobs(self._transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.close()

    async def generate(self, prompt: str, **fields: Unpack[Fields]) -> Generation:
        call = await asyncio.to_thread(calls.generate, prompt, fields)
        return await self._transport.send(call)

    async def edit(
        self,
        image: ImageInput,
        prompt: str,
        mask: ImageInput | None = None,
        **fields: Unpack[EditFields],
    ) -> Generation:
        return await self.generate(prompt, image=image, mask_image=mask, **fields)

    def stream(self, prompt: str, **fields: Unpack[Fields]) -> AsyncStream:
        """As Client.stream; but what is wrong with a field is raised by the first event."""
        make_call = partial(calls.generate_stream, prompt, fields)
        return AsyncStream(self._transport.messages(make_call), fields.get("num_images", 1))

    async def models(self) -> list[Model]:
        return await self._transport.send(calls.models())

    async def samplers(self) -> list[Sampler]:
        return await self._transport.send(calls.samplers())

    async def stats(self) -> Stats:
        return await self._transport.send(calls.stats())

    async def batch(self) -> AsyncGenerator[Batch, None]:
        while True:
            batch = None
            async with aclosing(self._transport.messages(calls.batch)) as messages:
                async for message in messages:
                    yield (batch := to_batch(message))
            check_told(batch)

    async def ready(self) -> bool:
        try:
            return await self._transport.send_once(calls.ready())
        except SDBentoError as error:
            return _not_ready(error)


def _not_ready(error: SDBentoError) -> bool:
    """False for a server that is starting, or is not there; any other error is a wrong address."""
    if 0 < error.status < 500:
        raise error
    return False
