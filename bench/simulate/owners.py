"""Two owners of requests on one device: one has many waiting, the other asks now and then."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import islice

from bench.simulate.curves import Curves
from bench.simulate.device import Load, MakePolicy, Outcome, open_loop
from bench.simulate.policies import Ours
from bench.simulate.traces import MIXED, Request

PAUSE = 10.0  # from one light request to the next, in the mean: times of one alone
HEAVY, LIGHT = "heavy", "light"


@dataclass(frozen=True)
class Heavy:
    """`at_once` images are sent together; whenever `group` of them are done, as many follow."""

    name: str
    at_once: int
    group: int


@dataclass(frozen=True)
class Light:
    """Requests of `images` equal images."""

    name: str
    images: int = 1
    steps: int = 20

    def request(self, side: int) -> list[Request]:
        return [Request(self.steps, side, owner=LIGHT)] * self.images


HEAVIES = (
    Heavy("400 at once", 400, 400),
    Heavy("32 unfinished", 32, 1),
)
LIGHTS = (
    Light("1 image"),
    Light("1 image of 4 steps", steps=4),
    Light("16 images", images=16),
)


class TwoOwners:
    """The light owner asks at random, for as long as the heavy one has images that are not done."""

    def __init__(
        self,
        curves: Curves,
        make: MakePolicy,
        heavy: Heavy,
        light: Light,
        num_images: int,
        seed: int,
    ) -> None:
        self._load = Load(curves, make, self._answered)
        self._heavy = heavy
        self._images = iter(MIXED.draw(num_images, curves.side, seed))
        self._num_left = num_images
        self._request = light.request(curves.side)
        self._alone = open_loop(curves, Ours, self._request).worst
        self._rng = random.Random(seed)
        self._unanswered: dict[float, int] = {}  # images of light requests, by time of arrival
        self._took: list[float] = []

    def run(self) -> tuple[list[float], Outcome]:
        """How long light requests took, as multiples of one alone; and what came of all images."""
        self._send(self._heavy.at_once)
        self._pause()
        outcome = self._load.run()
        return self._took, outcome

    def _send(self, count: int) -> None:
        for image in islice(self._images, count):
            self._load.device.submit(replace(image, at=self._load.clock(), owner=HEAVY))

    def _pause(self) -> None:
        self._load.clock.after(self._rng.expovariate(1 / (PAUSE * self._alone)), self._ask)

    def _ask(self) -> None:
        if self._num_left == 0:
            return
        now = self._load.clock()
        self._unanswered[now] = len(self._request)
        for image in self._request:
            self._load.device.submit(replace(image, at=now))
        self._pause()

    def _answered(self, image: Request) -> None:
        if image.owner == HEAVY:
            self._num_left -= 1
            if self._num_left % self._heavy.group == 0:
                self._send(self._heavy.group)
            return
        self._unanswered[image.at] -= 1
        if self._unanswered[image.at] == 0:
            self._took.append((self._load.clock() - image.at) / self._alone)
