"""The HTTP calls of the SDK's job loop to RunPod's platform: take jobs, post results and events.

They replace two functions of the SDK (1.12.0) that lose jobs and results:

- `get_job` (modules/rp_job.py) loses every job of a batch if Python's json cannot read the input of
  one of them ("RecursionError: maximum recursion depth exceeded", "Exceeds the limit (4300 digits)
  for integer string conversion").
- `_transmit` (modules/rp_http.py) posts a result again after an HTTP 500, but not after a broken
  connection or a 429; and when it does, then with the id of whichever job has posted last.

Knows nothing of what is in a job.
"""

from __future__ import annotations

import json
import re
from typing import Any

import aiohttp
from aiohttp_retry import FibonacciRetry, RetryClient
from runpod.http_client import TooManyRequests
from runpod.serverless.modules.rp_job import _job_get_url

POST_ATTEMPTS = 6  # with pauses of 2, 3, 5, 8 and 10 seconds
LONGEST_PAUSE = 10.0  # seconds
POST_SECONDS = 120.0  # for one attempt
RETRIED_STATUSES = {408, 425, 429}  # and all from 500
RETRIED_ERRORS = {
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    aiohttp.ClientResponseError,  # not an HTTP status: an answer that is not HTTP
    TimeoutError,
}
MAX_DEPTH = 100  # of values in values, where Python's json has met too many; no request has as many
# Strings, whose brackets do not count; single brackets; and everything between them.
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}]|[^"\[\]{}]+', re.DOTALL)

Session = aiohttp.ClientSession
WireJob = dict[str, Any]  # a job as the platform sends it, {"id": ..., "input": ...}


async def take(session: Session, num_jobs: int) -> list[Any]:
    """Up to `num_jobs` jobs as the platform sends them, not yet validated; waits a while for some.

    Raises TooManyRequests, aiohttp's errors, and ValueError for an answer that is not JSON.
    """
    async with session.get(_job_get_url(num_jobs)) as response:
        if response.status in (204, 400):  # 400: FlashBoot has put this worker to sleep
            return []
        if response.status == 429:
            raise TooManyRequests(response.request_info, response.history, status=429)
        response.raise_for_status()
        text = await response.text()
    answer = read(text) if text else []
    return answer if isinstance(answer, list) else [answer]


def read(text: str) -> Any:
    """The value of a JSON text, even if it has values or numbers that Python's json refuses.

    Such a value is replaced by null or a float: its own job is refused for it later on, but the
    other jobs of the batch are run. Raises ValueError if `text` is not JSON.
    """
    try:
        return json.loads(text, parse_int=_number)
    except RecursionError:
        return json.loads(_without_deep_values(text), parse_int=_number)


def _number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python refuses integers of more than 4300 digits
        return float(digits)


def _without_deep_values(text: str) -> str:
    """The JSON text with null in place of whatever is nested deeper than MAX_DEPTH."""
    kept, depth = [], 0
    for token in _TOKENS.findall(text):
        depth += token in ("[", "{")
        if depth <= MAX_DEPTH:
            kept.append(token)
        elif depth == MAX_DEPTH + 1 and token in ("[", "{"):
            kept.append("null")
        depth -= token in ("]", "}")
    return "".join(kept)


async def post(session: Session, url: str, data: str) -> None:
    """Post a job's result or event, and again if it fails. Raises aiohttp's errors."""
    retries = FibonacciRetry(
        attempts=POST_ATTEMPTS,
        max_timeout=LONGEST_PAUSE,
        statuses=RETRIED_STATUSES,
        exceptions=RETRIED_ERRORS,
    )
    headers = {
        "charset": "utf-8",
        "Content-Type": "application/x-www-form-urlencoded",
        # Copied now: when the next job's result is posted, the SDK writes that job's id there.
        "X-Request-ID": session.headers["X-Request-ID"],
    }
    client = RetryClient(session, retry_options=retries)
    limit = aiohttp.ClientTimeout(total=POST_SECONDS)
    try:
        async with client.post(url, data=data, headers=headers, timeout=limit) as response:
            response.raise_for_status()
            await response.read()
    except TimeoutError as exc:
        # The SDK catches and logs aiohttp's errors; any other would end the job's task unseen.
        raise aiohttp.ServerTimeoutError(f"no answer within {POST_SECONDS:g} seconds") from exc
