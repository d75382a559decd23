"""Jobs of /run: they go on when their client leaves, and their results are kept for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from math import inf
from typing import Any, Unpack

from sdbento.client import calls
from sdbento.client.answers import UNFINISHED, Generation, Job, to_generation
from sdbento.client.errors import JobFailed, JobUnfinished, NotUnderstood
from sdbento.client.events import Done, Event, to_event
from sdbento.client.fields import Fields, Policy
from sdbento.client.transport import AsyncTransport, Transport

PAUSE = 0.5  # seconds before asking again where the server did not wait, as one that is stopping


class Jobs:
    """The jobs of one server. All methods raise SDBentoError, NotFound for an unknown id."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(
        self,
        prompt: str,
        *,
        webhook: str | None = None,
        policy: Policy | None = None,
        **fields: Unpack[Fields],
    ) -> Job:
        """Queue a request, with the fields of Client.generate. Returns its job, whose `id` counts.

        webhook: a URL that is posted the job's status when it ends.
        """
        return self._transport.send(calls.submit(prompt, webhook, policy, fields))

    def status(self, job_id: str) -> Job:
        """The job as it is now, with its output if it is completed."""
        return self._transport.send(calls.job_status(job_id))

    def wait(self, job_id: str, timeout: float | None = None) -> Generation:
        """The images of a job that `submit` has made, once it has ended.

        Raises JobFailed if it ended otherwise, and JobUnfinished after `timeout` seconds. The job
        goes on then.
        """
        give_up = time.monotonic() + (inf if timeout is None else timeout)
        while True:
            job = self._transport.send(calls.job_end(job_id, give_up - time.monotonic()))
            if not _unfinished(job, give_up):
                return self._images_of(job)
            time.sleep(PAUSE)

    def stream(self, job_id: str) -> Generator[Event, None, None]:
        """What happens to a job that `submit` has made, and at last Done, or JobFailed.

        Each event is told once, to whoever asks first. The job goes on if this is closed.
        """
        status = UNFINISHED[0]
        while status in UNFINISHED:
            answer = self._transport.send(calls.job_events(job_id))
            status, events = _events_in(answer)
            yield from events
            if not events:
                time.sleep(PAUSE)
        yield Done(self._images_of(self.status(job_id)))

    def cancel(self, job_id: str) -> Job:
        """Stop a job; one that runs stops between two steps. One that has ended stays as it is."""
        return self._transport.send(calls.cancel(job_id))

    def retry(self, job_id: str) -> Job:
        """Queue a job again that failed or timed out. Raises MalformedRequest for any other."""
        return self._transport.send(calls.retry(job_id))

    def _images_of(self, job: Job) -> Generation:
        files = {url: self._transport.send(calls.file(url)) for url in job.urls}
        return _generation(job, files)


class AsyncJobs:
    """As Jobs."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def submit(
        self,
        prompt: str,
        *,
        webhook: str | None = None,
        policy: Policy | None = None,
        **fields: Unpack[Fields],
    ) -> Job:
        call = await asyncio.to_thread(calls.submit, prompt, webhook, policy, fields)
        return await self._transport.send(call)

    async def status(self, job_id: str) -> Job:
        return await self._transport.send(calls.job_status(job_id))

    async def wait(self, job_id: str, timeout: float | None = None) -> Generation:
        give_up = time.monotonic() + (inf if timeout is None else timeout)
        while True:
            job = await self._transport.send(calls.job_end(job_id, give_up - time.monotonic()))
            if not _unfinished(job, give_up):
                return await self._images_of(job)
            await asyncio.sleep(PAUSE)

    async def stream(self, job_id: str) -> AsyncGenerator[Event, None]:
        status = UNFINISHED[0]
        while status in UNFINISHED:
            answer = await self._transport.send(calls.job_events(job_id))
            status, events = _events_in(answer)
            for event in events:
                yield event
            if not events:
                await asyncio.sleep(PAUSE)
        yield Done(await self._images_of(await self.status(job_id)))

    async def cancel(self, job_id: str) -> Job:
        return await self._transport.send(calls.cancel(job_id))

    async def retry(self, job_id: str) -> Job:
        return await self._transport.send(calls.retry(job_id))

    async def _images_of(self, job: Job) -> Generation:
        files = {url: await self._transport.send(calls.file(url)) for url in job.urls}
        return await asyncio.to_thread(_generation, job, files)


def _unfinished(job: Job, give_up: float) -> bool:
    """Whether to wait on. Raises JobUnfinished when it is time to `give_up`."""
    if job.unfinished and time.monotonic() >= give_up:
        raise JobUnfinished(f"job {job.id} is still {job.status}")
    return job.unfinished


def _events_in(answer: dict[str, Any]) -> tuple[str, list[Event]]:
    """The job's status and what happened, but for its end: /stream leaves out a large output."""
    try:
        messages = [event["output"] for event in answer["stream"]]
        events = [to_event(message) for message in messages if message["event"] != "done"]
        return str(answer["status"]), [event for event in events if event is not None]
    except (KeyError, TypeError) as error:
        raise NotUnderstood(f"/stream answered something unknown: {str(error)[:500]}") from error


def _generation(job: Job, files: Mapping[str, bytes]) -> Generation:
    """Raises JobFailed, and NotUnderstood for a job that did not ask for what `submit` asks for."""
    if job.status != "COMPLETED":
        raise JobFailed(job)
    try:
        return to_generation(job.output, files)
    except ValueError as error:
        raise NotUnderstood(
            f"the output of job {job.id} has not the form that jobs.submit asks for; "
            "jobs.status returns it as it is"
        ) from error
