"""The events of one job of RunPod's queue, posted for /stream while the job runs.

A post may take longer than a step. So events wait for their turn, and a newer event replaces one of
the same kind and image that still waits. If events cannot be posted, the job runs on regardless.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any, Self

from runpod.http_client import AsyncClientSession
from runpod.serverless.modules.rp_http import stream_result

from sdbento.background import start_task
from sdbento.jobs.delivery.deliver import posted_size
from sdbento.jobs.progress import EventBuffer, Message
from sdbento.jobs.runpod_format import MAX_EVENT_BYTES

log = logging.getLogger(__name__)

FINISH_SECONDS = 10.0  # for which a finished job waits until its last events are posted


class EventPoster:
    """`push` events; `finish` waits until the last are posted. Leaving the context stops posting.

    It has an HTTP session of its own, because the SDK does not give away the one it posts with.
    """

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._events = EventBuffer()
        self._complete = False

    async def __aenter__(self) -> Self:
        self._session = AsyncClientSession()
        self._posting = start_task(self._post_all(), f"sdbento stream of job {self._job_id}")
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

    def push(self, message: Message) -> None:
        self._events.push(message)

    async def finish(self, output: Any) -> None:
        """Post what still waits and the last event, which has the output unless it is too large."""
        event = {"event": "done", "output": output}
        fits = await asyncio.to_thread(posted_size, event) <= MAX_EVENT_BYTES
        self.push(event if fits else {"event": "done", "output": None})
        self._complete = True
        await asyncio.wait({self._posting}, timeout=FINISH_SECONDS)

    async def _post_all(self) -> None:
        while self._events or not self._complete:
            if not self._events:
                self._events.changed.clear()
                await self._events.changed.wait()
            event = self._events.take_oldest()
            try:
                await stream_result(self._session, {"output": event}, {"id": self._job_id})
            except Exception as exc:  # most are not raised: the SDK logs them
                log.warning("an event of job %s was not posted: %s", self._job_id, exc)
