"""The job routes of RunPod's serverless API: a client of it changes its host and nothing else.

POST /run, /runsync, /cancel/{id}, /retry/{id}, /purge-queue; GET /status/{id}, /status-sync/{id},
/stream/{id}, /health; each also under /v2/{endpoint_id}, whatever the endpoint is called. A key
sees its own jobs only. A job continues when its client disconnects: only /cancel stops it. A
handler that changes jobs finishes the change even if its client disconnects meanwhile.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdbento.doors.docs.bodies import json_body
from sdbento.doors.http.routing import app_of, door
from sdbento.doors.runpod.answers import (
    JobDetails,
    JobEvents,
    JobState,
    Purged,
    QueueHealth,
)
from sdbento.doors.runpod.lifespan import running_jobs
from sdbento.errors import InvalidParameter, NotFound, Unavailable
from sdbento.jobs.fleet.servers import State
from sdbento.jobs.runpod_format import Submission, new_job
from sdbento.jobs.service import Jobs

if TYPE_CHECKING:
    pass

WAIT = 90_000  # ms for which /runsync and /status-sync wait if the client does not say
# The same for /stream: long enough that RunPod's two SDKs that ask again without a pause do not do
# so all the time, short enough for its SDK that gives up after 10 s.
STREAM_WAIT = 5000
MIN_WAIT, MAX_WAIT = 1000, 300_000


def jobs_of(request: Request) -> Jobs:
    if (jobs := running_jobs(request.app)) is None:
        raise Unavailable("jobs cannot be kept; the server's log says why")
    return jobs


async def run(request: Request) -> Response:
    """Submit a job and go on."""
    job_id = await _submit(request, sync=False)
    return JSONResponse({"id": job_id, "status": "IN_QUEUE"})


async def runsync(request: Request) -> Response:
    """Submit a job and wait for its end."""
    seconds = _seconds(request, WAIT)
    job_id = await _submit(request, sync=True)
    jobs = jobs_of(request)
    return _json(await jobs.describe(await jobs.wait(job_id, seconds)))


async def status(request: Request) -> Response:
    """A job, with its output once it has been completed."""
    jobs = jobs_of(request)
    return _json(await jobs.describe(await jobs.get(_id(request))))


async def status_sync(request: Request) -> Response:
    """As /status, at the end of the job.

    Missing in RunPod's reference, but its SDKs for JavaScript and Go call it after /runsync.
    """
    jobs, seconds = jobs_of(request), _seconds(request, WAIT)
    return _json(await jobs.describe(await jobs.wait(_id(request), seconds)))


async def stream(request: Request) -> Response:
    """What has happened to a job since the last call."""
    seconds = _seconds(request, STREAM_WAIT)
    job, events = await jobs_of(request).stream(_id(request), seconds)
    answer = {"status": job.status, "stream": [{"output": event} for event in events]}
    return _json(await asyncio.to_thread(lambda: json.dumps(answer).encode()))


async def cancel(request: Request) -> Response:
    """Stop a job."""
    job = await asyncio.shield(jobs_of(request).cancel(_id(request)))
    return JSONResponse({"id": job.id, "status": job.status})


async def retry(request: Request) -> Response:
    """Run a job again that has failed or timed out."""
    await asyncio.shield(jobs_of(request).retry(_id(request)))
    return JSONResponse({"id": _id(request), "status": "IN_QUEUE"})


async def purge_queue(request: Request) -> Response:
    """Remove all jobs that have not begun."""
    removed = await asyncio.shield(jobs_of(request).purge())
    return JSONResponse({"removed": removed, "status": "completed"})


async def health(request: Request) -> Response:
    """Counts of the jobs in the store, and of workers: the servers that share it."""
    jobs = jobs_of(request)
    counts = await jobs.counts()
    num = counts.by_status
    answer: dict[str, Any] = {
        "jobs": {
            "completed": num["COMPLETED"],
            "failed": num["FAILED"] + num["TIMED_OUT"],
            "inProgress": num["IN_PROGRESS"],
            "inQueue": num["IN_QUEUE"],
            "retried": counts.retries,
        },
        "workers": _count(await jobs.workers()),
    }
    return JSONResponse(answer)


def _count(workers: list[tuple[State, bool]]) -> dict[str, int]:
    """How many workers are in which state, of which some overlap."""
    return {
        "idle": sum(state.ready and not busy for state, busy in workers),
        "initializing": sum(state.alive and not state.ready for state, _ in workers),
        "ready": sum(state.ready for state, _ in workers),
        "running": sum(state.alive and busy for state, busy in workers),
        "throttled": 0,
        "unhealthy": sum(not state.alive for state, _ in workers),
    }


async def _submit(request: Request, *, sync: bool) -> str:
    """Store the job that a request asks for. Returns its id."""
    jobs = jobs_of(request)
    settings = app_of(request).settings
    new = await asyncio.to_thread(new_job, await request.body(), settings, sync=sync)
    await asyncio.shield(jobs.submit(new))
    return new.id


def _id(request: Request) -> str:
    job_id = str(request.path_params["id"])
    if "\0" in job_id:  # PostgreSQL cannot compare text with this character
        raise NotFound("there is no job of that id", param="id")
    return job_id


def _seconds(request: Request, default: int) -> float:
    """How long a request may wait, in seconds, from its query, which like `default` is in ms."""
    given = request.query_params.get("wait", str(default))
    if not given.isdecimal() or len(given) > 6 or not MIN_WAIT <= int(given) <= MAX_WAIT:
        raise InvalidParameter(
            f"wait must be {MIN_WAIT} to {MAX_WAIT} milliseconds; given: {given[:80]!r}",
            param="wait",
        )
    return int(given) / 1000


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


READ = ["GET", "POST"]  # RunPod's older clients post
SUBMITTED = {"requestBody": json_body(Submission)}
WAITS = {
    "parameters": [
        {
            "name": "wait",
            "in": "query",
            "description": "Milliseconds to wait for news",
            "schema": {"type": "integer", "minimum": MIN_WAIT, "maximum": MAX_WAIT},
        }
    ]
}


@dataclass(frozen=True)
class JobRoute:
    """`described` adds to the OpenAPI document what the handler reads of a request by itself."""

    path: str
    handler: Callable[[Request], Awaitable[Response]]
    methods: list[str]
    answer: type[BaseModel]
    described: dict[str, Any] = field(default_factory=dict)


ROUTES = (
    JobRoute("/run", run, ["POST"], JobState, SUBMITTED),
    JobRoute("/runsync", runsync, ["POST"], JobDetails, SUBMITTED | WAITS),
    JobRoute("/status/{id}", status, READ, JobDetails),
    JobRoute("/status-sync/{id}", status_sync, READ, JobDetails, WAITS),
    JobRoute("/stream/{id}", stream, READ, JobEvents, WAITS),
    JobRoute("/cancel/{id}", cancel, ["POST"], JobState),
    JobRoute("/retry/{id}", retry, ["POST"], JobState),
    JobRoute("/purge-queue", purge_queue, ["POST"], Purged),
    JobRoute("/health", health, ["GET"], QueueHealth),
)
router = door("Jobs")
for route in ROUTES:
    for prefix in ("", "/v2/{endpoint_id}"):
        router.add_api_route(
            prefix + route.path,
            route.handler,
            methods=route.methods,
            response_model=route.answer,
            openapi_extra=route.described,
            include_in_schema=not prefix,
        )
