"""What is known of the present request: gathered while it is handled, told in the log at its end.

A context variable and no parameter, as for the caller: tasks and threads that work on the request
inherit it. Knows nothing of HTTP.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sdbento.errors import SDBentoError

MAX_CONTENTS = 8  # prompts of one request in its line of the log, and as many URLs
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass
class RequestFacts:
    """One request. `id` is what its user can quote. `key`: the name of the key that it came with.

    `error`: why it failed. `queued`: seconds until its first image was begun. `prompts` and
    `image_urls` may be told only where the operator asks for them.
    """

    id: str
    key: str | None = None
    client: str | None = None
    error: SDBentoError | None = None
    model: str | None = None
    num_images: int = 0
    queued: float | None = None
    prompts: list[str] = field(default_factory=list)
    image_urls: list[str] = field(default_factory=list)

    def told(self, outcome: str, seconds: float, *, with_contents: bool) -> dict[str, Any]:
        """What its line of the log says, of what is known. `seconds`: that it took in all."""
        told: dict[str, Any] = {
            "outcome": outcome,
            "error": self.error.type if self.error else None,
            "key": self.key,
            "client": self.client,
            "model": self.model,
            "images": self.num_images or None,
            "queued": None if self.queued is None else round(self.queued, 4),
            "seconds": round(seconds, 4),
        }
        if with_contents:
            told |= {"prompts": self.prompts or None, "image_urls": self.image_urls or None}
        return {name: value for name, value in told.items() if value is not None}

    def add_contents(self, prompts: Iterable[str], image_urls: Iterable[str]) -> None:
        """What the request asks for; one of many parts is known by the first of them."""
        self.prompts = [*self.prompts, *prompts][:MAX_CONTENTS]
        self.image_urls = [*self.image_urls, *image_urls][:MAX_CONTENTS]


_present: ContextVar[RequestFacts | None] = ContextVar("request_facts", default=None)


def present_request() -> RequestFacts | None:
    """The request that is being handled; None: what runs belongs to none."""
    return _present.get()


@contextmanager
def handling(facts: RequestFacts) -> Iterator[None]:
    """What runs from here on belongs to this request."""
    token = _present.set(facts)
    try:
        yield
    finally:
        _present.reset(token)


def note_caller(key: str | None, address: str | None) -> None:
    """Who sends the present request: the name of his key, and his address where that is known."""
    if (facts := _present.get()) is not None:
        facts.key, facts.client = key, address or facts.client


def note_error(error: SDBentoError) -> None:
    """The present request fails with `error`."""
    if (facts := _present.get()) is not None:
        facts.error = error


def request_id(given: str | None) -> str:
    """The id that a client has given its request, if that is well formed, or else a new one."""
    if given is not None and _ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
