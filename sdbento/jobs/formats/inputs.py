"""Reads the input of a job, whichever program it is for."""

from __future__ import annotations

import random
from typing import Any

from sdbento.jobs.delivery.s3_config import S3Config
from sdbento.jobs.formats.a1111 import Call, call_of, with_seed
from sdbento.jobs.formats.native import JobInput, parse_input


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
