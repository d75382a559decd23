"""What clients of RunPod's job API send and receive around inputs and outputs.

Knows nothing of HTTP and of how jobs are run. Parsing and writing may take a while, because inputs
and outputs carry images: call these functions on a thread.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdbento.errors import MalformedRequest, SDBentoError
from sdbento.jobs.delivery.bucket import BucketOfJob
from sdbento.jobs.delivery.s3_config import s3_config_of
from sdbento.jobs.formats.inputs import model_of, settle_seed
from sdbento.jobs.table import SYNC_PREFIX, Job, NewJob
from sdbento.outbound.urls import check_send, host_of, parse
from sdbento.request.parse import explain
from sdbento.settings import Settings

MAX_SYNC_KEEP = 60_000  # ms for which the result of a /runsync job is kept
MAX_EVENT_BYTES = 1_000_000  # RunPod's limit for one event of /stream
WEEK = 604_800_000  # ms


class Policy(BaseModel):
    """How long a job may wait and run, in ms, within RunPod's limits."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    execution_timeout: int = Field(600_000, alias="executionTimeout", ge=5000, le=WEEK)
    ttl: int = Field(86_400_000, ge=10_000, le=WEEK)
    low_priority: bool = Field(False, alias="lowPriority")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        """Clients in typed languages send fields that they do not set as null."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Submission(BaseModel):
    """The body of /run and /runsync. Other fields are ignored, as on RunPod."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    input: dict[str, Any]
    webhook: str | None = Field(None, max_length=2000)
    policy: Policy | None = None
    s3_config: dict[str, Any] | None = Field(
        None,
        alias="s3Config",
        repr=False,
        description="A bucket for the images of this job: accessId, accessSecret, bucketName and "
        "endpointUrl",
    )


def new_job(body: bytes, settings: Settings, *, sync: bool) -> NewJob:
    """The job that the body of /run, or of /runsync if `sync`, asks for.

    As on RunPod, a bad input makes a job that has failed, but everything around the input is
    refused at once: raises MalformedRequest, InvalidParameter. If no seed is given it is chosen
    here, so that the job makes the same images however often it has to be started again.
    """
    submission = _submission(body)
    webhook, webhook_host = submission.webhook or None, None
    if webhook is not None:
        check_send(webhook, settings, param="webhook")
        webhook_host = host_of(parse(webhook))
    if (s3_config := s3_config_of(submission.s3_config)) is not None:
        BucketOfJob(s3_config, settings)  # refused now rather than when the images are made
    given, error, model = submission.input, None, None
    try:
        given = settle_seed(given)
        model = model_of(given, settings.sd_model)
    except SDBentoError as exc:
        error = one_line(exc)
    policy = submission.policy or Policy()
    keep = settings.job_result_seconds * 1000
    return NewJob(
        id=f"{SYNC_PREFIX if sync else ''}{uuid.uuid4()}-u1",
        input=json.dumps(given),
        keep=min(keep, MAX_SYNC_KEEP) if sync else keep,
        ttl=policy.ttl,
        execution_timeout=policy.execution_timeout,
        low_priority=policy.low_priority,
        webhook=webhook,
        webhook_host=webhook_host,
        error=error,
        model=model,
        s3_config=None if s3_config is None else s3_config.stored(),
    )


def _submission(body: bytes) -> Submission:
    try:
        return Submission.model_validate_json(body)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["loc"][:1] == ("input",):
            raise MalformedRequest('the body must have an "input" that is an object') from None
        raise explain(error) from None


def one_line(error: SDBentoError) -> str:
    """The message of an error as the `error` of a job, which is one line on RunPod."""
    return " ".join(error.message.replace("\0", " ").split())


def status_body(job: Job, result: bytes | None) -> bytes:
    """What /status answers and webhooks receive, as JSON. `result` is JSON already."""
    before, after = around_result(job)
    if job.status != "COMPLETED":
        return before
    return b"".join((before, result or b"null", after))  # copied once: it may be large


def around_result(job: Job) -> tuple[bytes, bytes]:
    """What of the status body comes before the result of a completed job, and after it."""
    fields: dict[str, Any] = {"id": job.id, "status": job.status}
    if job.delay is not None:
        fields["delayTime"] = job.delay
    if job.execution is not None:
        fields["executionTime"] = job.execution
    if job.error is not None:
        fields["error"] = job.error
    body = json.dumps(fields).encode()
    return (b'%s, "output": ' % body[:-1], b"}") if job.status == "COMPLETED" else (body, b"")
