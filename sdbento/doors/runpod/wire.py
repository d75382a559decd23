"""What passes between the SDK's job loop and the platform: jobs that are taken, results posted.

In place of two functions of the SDK (1.12.0), which lose what need not be lost. `get_job` (modules/
rp_job.py) loses all jobs of a batch over one whose input Python's json does not read. `_transmit`
(modules/rp_http.py) posts a result again after an HTTP 500, but not after a broken connection or a
429, and then with the id of whichever job has posted last. Knows nothing of what a job is.
"""

from __future__ import annotations

import json
import re
from typing import Any

import aiohttp
from aiohttp_retry import FibonacciRetry, RetryClient
from runpod.http_client import TooManyRequests
from runpod.serverless.modules.rp_job import _job_get_url

POST_ATTEMPTS = 6  # with pauses of 2, 3, 5, 8 and
LAST_PAUSE = 10.0  # seconds
POST_SECONDS = 120.0  # that each may take
COME_AGAIN = {408, 425, 429}
BROKEN = {
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    aiohttp.ClientResponseError,  # not a status: an answer that is not HTTP
    TimeoutError,
}
MAX_DIGITS = 300  # of a whole number; Python itself refuses to read 4300
MAX_DEPTH = 100  # of a job; Python itself refuses about 1000
_BRACKETS = re.compile(r'"(?:[^"\\]+|\\.)*"|[\[{]|[\]}]', re.DOTALL)  # and strings, to skip them

Session = aiohttp.ClientSession


async def take(session: Session, num_jobs: int) -> list[Any]:
    """Up to `num_jobs` jobs as the platform sends them, or none; unchecked.

    Raises TooManyRequests, aiohttp's errors, and ValueError for an answer that is not JSON.
    """
    async with session.get(_job_get_url(num_jobs)) as response:
        if response.status in (204, 400):  # 400: a worker that FlashBoot has put to sleep
            return []
        if response.status == 429:
            raise TooManyRequests(response.request_info, response.history, status=429)
        response.raise_for_status()
        text = await response.text()
    answer = read(text) if text else []
    return answer if isinstance(answer, list) else [answer]


def read(text: str) -> Any:
    """JSON as Python reads it, also where a number is too long or values lie too deep for that."""
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError:
        return json.loads(_without_depths(text), parse_int=_whole_number)


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _without_depths(text: str) -> str:
    """JSON with null for whatever lies deeper than any request does."""
    kept, depth, shallow = [], 0, 0
    for found in _BRACKETS.finditer(text):
        if found[0] in "[{":
            if depth == MAX_DEPTH:
                kept.append(text[shallow : found.start()] + "null")
            depth += 1
        elif found[0] in "]}":
            depth -= 1
            if depth == MAX_DEPTH:
                shallow = found.end()
    return "".join(kept) + text[shallow:]


async def post(session: Session, url: str, data: str) -> None:
    """Post a job's result or event until the platform has heard it. Raises aiohttp's errors.

    `session.headers` has the job's id for this moment only: the next post writes its own there.
    """
    patience = FibonacciRetry(
        attempts=POST_ATTEMPTS, max_timeout=LAST_PAUSE, statuses=COME_AGAIN, exceptions=BROKEN
    )
    headers = {
        "charset": "utf-8",
        "Content-Type": "application/x-www-form-urlencoded",
        "X-Request-ID": session.headers["X-Request-ID"],
    }
    client = RetryClient(session, retry_options=patience)
    limit = aiohttp.ClientTimeout(total=POST_SECONDS)
    try:
        async with client.post(url, data=data, headers=headers, timeout=limit) as response:
            response.raise_for_status()
            await response.read()
    except TimeoutError as exc:
        # The SDK logs what is an error of aiohttp's; another would be the end of the job's task.
        raise aiohttp.ServerTimeoutError(f"no answer within {POST_SECONDS:g} seconds") from exc
