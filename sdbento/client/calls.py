"""One call of the server as a value: what is sent, and how its answer is read.

Both clients send the same calls, one by blocking and one by awaiting. Knows nothing of how.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter

from sdbento.client.answers import (
    Generation,
    Job,
    Model,
    Models,
    Sampler,
    Samplers,
    to_generation,
)
from sdbento.client.errors import NotUnderstood, error_of
from sdbento.client.fields import Policy, as_request
from sdbento.live.stats import Stats

T = TypeVar("T")

_STATS = TypeAdapter(Stats)

LONGEST_WAIT = 50.0  # seconds for one call; many proxies hang up after a minute
TOLERANCE = 30.0  # seconds that an answer may take beyond the request's own `timeout`


@dataclass(frozen=True)
class Call(Generic[T]):
    """`read` makes the result of a successful answer; it may raise ValueError and TypeError.

    harmless: it may be sent twice, for that changes nothing and costs no work. foreign: `path` is a
    URL of any host, which must not learn the key. patience: seconds to wait for the answer, where
    the client itself would wait for less.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: bytes | None = None
    params: Mapping[str, str] | None = None
    harmless: bool = False
    patience: float = 0.0
    foreign: bool = False

    def result(self, response: httpx.Response) -> T:
        """What the answer means. Raises SDBentoError. The answer's body must have been read."""
        if not response.is_success:
            raise error_of(response)
        try:
            return self.read(response)
        except (ValueError, TypeError, KeyError) as error:
            told = NotUnderstood(f"{self.path} answered something unknown: {str(error)[:500]}")
            told.status = response.status_code
            raise told from error


def generate(prompt: str, fields: Mapping[str, Any]) -> Call[Generation]:
    """Reads files among `fields`, and checks all of them; raises as `as_request`."""
    return _with_images("/generate", prompt, fields, lambda answer: to_generation(answer.json()))


def generate_stream(prompt: str, fields: Mapping[str, Any]) -> Call[None]:
    """As `generate`; its answer is read event by event."""
    return _with_images("/generate_stream", prompt, fields, lambda _: None)


def _with_images(
    path: str, prompt: str, fields: Mapping[str, Any], read: Callable[[httpx.Response], T]
) -> Call[T]:
    request = as_request(prompt, fields)
    patience = (request.get("timeout") or 0.0) + TOLERANCE
    return Call("POST", path, read, json.dumps(request).encode(), patience=patience)


def models() -> Call[list[Model]]:
    return _get("/models", lambda answer: Models.model_validate_json(answer.content).models)


def samplers() -> Call[list[Sampler]]:
    return _get("/samplers", lambda answer: Samplers.model_validate_json(answer.content).samplers)


def batch() -> Call[None]:
    """What runs; read snapshot by snapshot, without end."""
    return _get("/batch", lambda _: None)


def stats() -> Call[Stats]:
    return _get("/stats", lambda answer: _STATS.validate_json(answer.content))


def ready() -> Call[bool]:
    return _get("/readyz", lambda answer: answer.status_code == HTTPStatus.OK)


def submit(
    prompt: str, webhook: str | None, policy: Policy | None, fields: Mapping[str, Any]
) -> Call[Job]:
    """Asks for all that /generate answers. Raises as `generate`."""
    request = {**as_request(prompt, fields), "return": "full"}
    around = {"webhook": webhook, "policy": policy}
    body = {"input": request} | {name: value for name, value in around.items() if value is not None}
    return Call("POST", "/run", _job, json.dumps(body).encode())


def job_status(job_id: str) -> Call[Job]:
    return _get(f"/status/{_segment(job_id)}", _job)


def job_end(job_id: str, seconds: float) -> Call[Job]:
    """The job when it has ended, or as it is after so many seconds, 1 to LONGEST_WAIT."""
    seconds = min(max(seconds, 1.0), LONGEST_WAIT)
    path, params = f"/status-sync/{_segment(job_id)}", {"wait": str(round(1000 * seconds))}
    return Call("GET", path, _job, params=params, harmless=True, patience=seconds + TOLERANCE)


def job_events(job_id: str) -> Call[dict[str, Any]]:
    """Its events since the last call, which are then forgotten: not harmless."""
    return Call("GET", f"/stream/{_segment(job_id)}", lambda answer: dict(answer.json()))


def cancel(job_id: str) -> Call[Job]:
    return Call("POST", f"/cancel/{_segment(job_id)}", _job, harmless=True)


def retry(job_id: str) -> Call[Job]:
    return Call("POST", f"/retry/{_segment(job_id)}", _job)


def file(url: str) -> Call[bytes]:
    """What lies at a URL that a job's output names."""
    return Call("GET", url, lambda answer: answer.content, harmless=True, foreign=True)


def _get(path: str, read: Callable[[httpx.Response], T]) -> Call[T]:
    return Call("GET", path, read, harmless=True)


def _job(response: httpx.Response) -> Job:
    return Job.model_validate_json(response.content)


def _segment(job_id: str) -> str:
    """An id as one part of a path, whatever characters it has; ".." would be the part above."""
    return quote(job_id, safe="").replace(".", "%2E")
