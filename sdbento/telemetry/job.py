"""One run of a job, as operators are told of it: a line of the log, and a span."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sdbento.errors import OK, classify
from sdbento.telemetry import spans
from sdbento.telemetry.request import RequestFacts, handling

log = logging.getLogger("sdbento.access")


@contextmanager
def running_job(
    job_id: str, key: str | None, caused_by: str | None, *, log_prompts: bool
) -> Iterator[None]:
    """The block runs a job. `caused_by`: the `traceparent` of the request that has queued it."""
    facts = RequestFacts(job_id, key)
    began = time.monotonic()
    known = {"sdbento.job_id": job_id, "enduser.id": key}
    with handling(facts), spans.continuing(caused_by, "job", known):
        try:
            yield
        except BaseException as exc:
            facts.error = classify(exc)
            raise
        finally:
            outcome = OK if facts.error is None else facts.error.outcome
            spans.describe({"sdbento.outcome": outcome})
            told = facts.told(outcome, time.monotonic() - began, with_contents=log_prompts)
            log.info("job", extra={"fields": told})
