"""Who asks for what, and when: traces drawn from a seed, or read from a file.

A file has one request a line:

    {"at": 0.25, "steps": 20, "side": 512, "rows": 2, "model": "a", "sampler": "Euler"}

`at` is in seconds; all but `at` and `steps` may be left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

SAMPLERS = 6  # as many as in the benchmark's trace
BURST = 8  # requests that arrive together in a bursty trace


@dataclass(frozen=True)
class Request:
    """One image; `rows` are those of each of its steps: two with guidance."""

    steps: int
    side: int
    rows: int = 2
    model: str = "a"
    sampler: str = "0"
    at: float = 0.0  # seconds after the start
    owner: str | None = None


@dataclass(frozen=True)
class Mix:
    """Kinds of requests, each drawn with equal probability."""

    name: str
    steps: tuple[int, ...]
    large: float = 0.0  # share with one and a half times the side
    models: tuple[str, ...] = ("a",)

    def draw(self, count: int, side: int, seed: int) -> list[Request]:
        """`count` requests, all of them there at the start."""
        rng = random.Random(seed)
        return [self._one(rng, side) for _ in range(count)]

    def _one(self, rng: random.Random, side: int) -> Request:
        return Request(
            steps=rng.choice(self.steps),
            side=side * 3 // 2 if rng.random() < self.large else side,
            rows=1 if rng.random() < 1 / 9 else 2,  # guidance is 1 to 9, and 1 is none
            model=rng.choice(self.models),
            sampler=str(rng.randrange(SAMPLERS)),
        )


MIXED = Mix("4 to 40 steps, one in five large", tuple(range(4, 41)), large=0.2)
MIXES = (
    MIXED,
    Mix("4 to 40 steps", tuple(range(4, 41))),
    Mix("4 to 40 steps, two models, one in five large", tuple(range(4, 41)), 0.2, ("a", "b")),
    Mix("4 steps, one in ten 150", (4,) * 9 + (150,)),
    Mix("20 steps", (20,)),
)


def poisson(requests: list[Request], rate: float, seed: int, burst: int = 1) -> list[Request]:
    """The same requests, arriving at random: `rate` a second in the mean, `burst` at a time."""
    rng, now = random.Random(seed), 0.0
    arriving: list[Request] = []
    for i, request in enumerate(requests):
        if i % burst == 0:
            now += rng.expovariate(rate / burst)
        arriving.append(replace(request, at=now))
    return arriving


def read(path: Path, side: int) -> list[Request]:
    """The requests of a file by time of arrival; `side` is for those that name none.

    Raises ValueError for a file without requests, or with something else.
    """
    requests = sorted(_lines(path, side), key=lambda request: request.at)
    if not requests:
        raise ValueError(f"{path} has no requests")
    return requests


def _lines(path: Path, side: int) -> Iterator[Request]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield Request(**{"side": side, **json.loads(line)})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is no request: {error}") from error
