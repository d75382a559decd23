"""The events of one RunPod job, posted for /stream while the job runs.

A post takes longer than a step may, so events wait for their turn and a newer one of the same kind
and image replaces the one that waits. A stream that cannot be posted never fails its job.
"""

from __future__ import annotations

import asyncio
import json
import logging
from types import TracebackType
from typing import Any, Self

from runpod.http_client import AsyncClientSession
from runpod.serverless.modules.rp_http import stream_result

log = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 1_000_000  # the platform's limit for one event
FINISH_SECONDS = 10.0  # that the last events may keep a finished job waiting

Event = dict[str, Any]


class JobStream:
    """Push events; `finish` sees the last ones off. Leaving the context stops the posting.

    The session is its own: the SDK keeps the one that it posts results with to itself.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = {"id": job["id"]}
        self._waiting: dict[tuple[str, int | None], Event] = {}
        self._news = asyncio.Event()
        self._complete = False

    async def __aenter__(self) -> Self:
        self._session = AsyncClientSession()
        self._posting = asyncio.create_task(self._post_all())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._posting.cancel()
        await asyncio.wait({self._posting})
        await self._session.close()

    def push(self, event: Event) -> None:
        """Let `event` wait for its turn; it goes behind those that wait already."""
        key = event["event"], event.get("image")
        self._waiting.pop(key, None)
        self._waiting[key] = event
        self._news.set()

    async def finish(self, output: Any) -> None:
        """Post what waits and the end, with the output where one event can carry it."""
        event = {"event": "done", "output": output}
        fits = await asyncio.to_thread(_size, event) <= MAX_CHUNK_BYTES
        self.push(event if fits else {"event": "done", "output": None})
        self._complete = True
        await asyncio.wait({self._posting}, timeout=FINISH_SECONDS)

    async def _post_all(self) -> None:
        while self._waiting or not self._complete:
            if not self._waiting:
                self._news.clear()
                await self._news.wait()
            event = self._waiting.pop(next(iter(self._waiting)))
            try:
                await stream_result(self._session, {"output": event}, self._job)
            except Exception as exc:  # the SDK has logged and swallowed most of them
                log.warning("an event of job %s was not posted: %s", self._job["id"], exc)


def _size(event: Event) -> int:
    return len(json.dumps({"output": event}, ensure_ascii=False).encode())
