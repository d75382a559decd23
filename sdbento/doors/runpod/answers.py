"""What the job routes answer, for the OpenAPI document: RunPod's shapes, field by field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from sdbento.jobs.table import Status


class JobState(BaseModel):
    id: str
    status: Status


class JobDetails(JobState):
    """A job; times are in milliseconds, and what is not known yet is left out."""

    delay_time: int | None = Field(None, alias="delayTime", description="Between arrival and start")
    execution_time: int | None = Field(None, alias="executionTime")
    error: str | None = None
    output: Any = Field(None, description="By default the images, in base64")


class Event(BaseModel):
    output: dict[str, Any] = Field(description="An event, as /generate_stream sends it")


class JobEvents(BaseModel):
    status: Status
    stream: list[Event] = Field(description="What has happened since the last call")


class Purged(BaseModel):
    removed: int
    status: Literal["completed"]


class JobCounts(BaseModel):
    completed: int
    failed: int
    in_progress: int = Field(alias="inProgress")
    in_queue: int = Field(alias="inQueue")
    retried: int


class WorkerCounts(BaseModel):
    idle: int
    initializing: int
    ready: int
    running: int
    throttled: int
    unhealthy: int


class QueueHealth(BaseModel):
    jobs: JobCounts
    workers: WorkerCounts
