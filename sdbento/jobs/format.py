"""What clients of RunPod's job API send and read: submissions, inputs, statuses.

A job's input is a request of every other door, beside a few flags for whoever answers it. Knows
nothing of HTTP and of how jobs are run. What parses or writes a body may take a while: a body may
carry pictures.
"""

from __future__ import annotations

import json
import random
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdbento.errors import MalformedRequest, SDBentoError
from sdbento.jobs.table import Job, NewJob
from sdbento.outbound import check
from sdbento.request.parse import explain, parse
from sdbento.request.schema import GenerateRequest, GenerateResponse
from sdbento.settings import Settings

SYNC_PREFIX = "sync-"  # of the ids of /runsync jobs
SYNC_KEEP = 60_000  # ms for which the result of such a job is kept, at most
WEEK = 604_800_000  # ms


class Policy(BaseModel):
    """How long a job may wait and run, within RunPod's limits. In ms."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    execution_timeout: int = Field(600_000, alias="executionTimeout", ge=5000, le=WEEK)
    ttl: int = Field(86_400_000, ge=10_000, le=WEEK)
    low_priority: bool = Field(False, alias="lowPriority")

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, given: Any) -> Any:
        """Typed clients send what they do not set as null."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Submission(BaseModel):
    """The body of /run and /runsync. What else RunPod's has is read over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    input: dict[str, Any]
    webhook: str | None = Field(None, max_length=2000)
    policy: Policy | None = None


class Flags(BaseModel):
    """What a job's input may say beside the request itself."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    stream: bool = Field(
        False, description="A worker posts progress for /stream; a server always has it"
    )
    shape: Literal["images", "full"] = Field(
        "images", alias="return", description="A list of base64 images, or all that is known"
    )
    allow_jpeg: bool = Field(
        False,
        description="A worker sends JPEG rather than fail when the result is over RunPod's limit",
    )


FLAGS = {field.alias or name for name, field in Flags.model_fields.items()}


@dataclass(frozen=True)
class JobInput:
    """A job's input, checked."""

    flags: Flags
    request: GenerateRequest

    def output(self, response: GenerateResponse) -> bytes:
        """The job's output as JSON: the images, or everything."""
        if self.flags.shape == "full":
            return response.model_dump_json().encode()
        return json.dumps(response.images).encode()


def read(given: dict[str, Any]) -> JobInput:
    """Raises errors of the tree."""
    try:
        flags = Flags.model_validate({name: given[name] for name in FLAGS & given.keys()})
    except ValidationError as error:
        raise explain(error) from None
    fields = {name: value for name, value in given.items() if name not in FLAGS}
    return JobInput(flags, parse(json.dumps(fields), what="the input"))


def accept(body: bytes, settings: Settings, *, sync: bool) -> NewJob:
    """The job that a body asks for.

    As on RunPod, a bad input makes a job that has failed; what is around the input is refused at
    once: MalformedRequest, InvalidParameter. A seed that is not given is drawn here, so that the
    job makes the same pictures however often it has to be begun.
    """
    submission = _submission(body)
    if submission.webhook:
        check(submission.webhook, settings, param="webhook")
    given, error = dict(submission.input), None
    try:
        asked = read(given)
        if asked.request.seed in (None, -1):
            given["seed"] = random.SystemRandom().randrange(2**32)
    except SDBentoError as exc:
        error = one_line(exc)
    policy = submission.policy or Policy()
    keep = settings.job_result_seconds * 1000
    return NewJob(
        id=f"{SYNC_PREFIX if sync else ''}{uuid.uuid4()}-u1",
        input=json.dumps(given),
        keep=min(keep, SYNC_KEEP) if sync else keep,
        ttl=policy.ttl,
        execution_timeout=policy.execution_timeout,
        low_priority=policy.low_priority,
        webhook=submission.webhook or None,
        error=error,
    )


def _submission(body: bytes) -> Submission:
    try:
        return Submission.model_validate_json(body)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["loc"][:1] == ("input",):
            raise MalformedRequest('the body must have an "input" that is an object') from None
        raise explain(error) from None


def one_line(error: SDBentoError) -> str:
    return " ".join(error.message.replace("\0", " ").split())


def status_body(job: Job, output: bytes | None) -> bytes:
    """What /status answers and webhooks carry, with the job's `output`, which is JSON already."""
    fields: dict[str, Any] = {"id": job.id, "status": job.status}
    if job.delay is not None:
        fields["delayTime"] = job.delay
    if job.execution is not None:
        fields["executionTime"] = job.execution
    if job.error is not None:
        fields["error"] = job.error
    body = json.dumps(fields).encode()
    if job.status != "COMPLETED":
        return body
    return b'%s, "output": %s}' % (body[:-1], output or b"null")
