"""A request that runs while its events are read, with its progress."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, Self

from sdbento.client.answers import Generation
from sdbento.client.errors import NoAnswer
from sdbento.client.events import Event, Progress

Messages = Generator[dict[str, Any], None, None]
AsyncMessages = AsyncGenerator[dict[str, Any], None]


class Stream:
    """The events of one request, of which Done is the last.

    The request is sent when the first event is asked for. Leaving the `with` block, or a loop over
    a stream that nothing else refers to, closes the connection, and the server stops the work.
    """

    def __init__(self, messages: Messages, num_images: int) -> None:
        self._messages = messages
        self._progress = Progress(num_images)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        for message in self._messages:
            if (event := self._progress.take(message)) is not None:
                return event
        _check_end(self._progress)
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def progress(self) -> float:
        """How much of the request is done, from 0 to 1."""
        return self._progress.share

    def result(self) -> Generation:
        """Wait for the end. Raises SDBentoError."""
        for _ in self:
            pass
        return _check_end(self._progress)

    def close(self) -> None:
        """Stop the request, unless it is done."""
        self._messages.close()


class AsyncStream:
    """As Stream. Without `async with` it is closed only when the event loop gets to it."""

    def __init__(self, messages: AsyncMessages, num_images: int) -> None:
        self._messages = messages
        self._progress = Progress(num_images)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        async for message in self._messages:
            if (event := self._progress.take(message)) is not None:
                return event
        _check_end(self._progress)
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def progress(self) -> float:
        return self._progress.share

    async def result(self) -> Generation:
        async for _ in self:
            pass
        return _check_end(self._progress)

    async def close(self) -> None:
        await self._messages.aclose()


def _check_end(progress: Progress) -> Generation:
    if progress.generation is None:
        raise NoAnswer("the stream ended before its images were there")
    return progress.generation
