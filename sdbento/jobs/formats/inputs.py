"""Reads and runs the input of a job, whichever program it is for."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sdbento.jobs.delivery.deliver import Result
from sdbento.jobs.delivery.s3_config import S3Config
from sdbento.jobs.formats.a1111 import AnswerCall, Call, call_of, with_seed
from sdbento.jobs.formats.native import JobInput, parse_input
from sdbento.jobs.progress import Message
from sdbento.request.events import Done, messages

if TYPE_CHECKING:
    from sdbento.app import App

MAX_NAME = 255  # characters of a model's


def read_input(given: dict[str, Any], s3_config: S3Config | None = None) -> JobInput | Call:
    """Validate an input, except for the payload of a call, which its door reads.

    Raises SDBentoError, usually InvalidParameter.
    """
    call = call_of(given, s3_config)
    return parse_input(given, s3_config) if call is None else call


def settle_seed(given: dict[str, Any]) -> dict[str, Any]:
    """Validate an input as `read_input` does, and choose the seed if it leaves that open.

    So it makes the same images however often it is run.
    """
    parsed = read_input(given)
    if isinstance(parsed, Call):
        return with_seed(given, parsed)
    if parsed.request.seed in (None, -1):
        return {**given, "seed": random.SystemRandom().randrange(2**32)}
    return given


def model_of(given: dict[str, Any], default: str) -> str | None:
    """The model that an input names, or the default; None for a call, and for no possible name."""
    name = given.get("model") or default
    is_name = isinstance(name, str) and len(name) <= MAX_NAME and name.isprintable()
    return name if is_name and call_of(given) is None else None


async def run_input(
    app: App,
    given: JobInput | Call,
    answer_call: AnswerCall,
    push: Callable[[Message], None] | None = None,
    seconds: float | None = None,
) -> Result:
    """What a validated input makes. Raises SDBentoError.

    push: is given the events of a request before its last, as JSON. A call has none. seconds: for
    which it may run, whatever its `timeout` and SDBENTO_MAX_TIMEOUT; None: as any other request.
    """
    if isinstance(given, Call):
        return given.result(await answer_call(given))
    async with aclosing(app.stream(given.request, seconds=seconds)) as events:
        async for event in events:
            if isinstance(event, Done):
                result = given.result(event.response)
            elif push is not None:
                for message in messages(event):
                    push(message)
    return result
