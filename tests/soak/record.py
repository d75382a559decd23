"""What was answered in a soak, and what of it should not have been."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.soak.calls import Call

Images = list[NDArray[np.int16]]
MAX_PROBLEMS = 200  # that are told; all are counted
LEVELS = 1  # of 255, that an image may differ from its solo run


@dataclass
class Record:
    """Written by all threads of the soak."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  # by mode and status
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    compared: int = 0
    worst: int = 0  # difference, in levels
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _disturbed: list[tuple[float, float]] = field(default_factory=list)

    def answered(self, mode: str, status: str, seconds: float) -> None:
        with self._lock:
            self.answers[mode, status] += 1
            if status == "200":
                self.seconds[mode].append(seconds)

    def problem(self, text: str) -> None:
        with self._lock:
            self.num_problems += 1
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(text)
                print(f"PROBLEM {text}", flush=True)

    def compare(self, mode: str, call: Call, images: Images, alone: Images) -> None:
        with self._lock:
            self.compared += len(images)
        if [image.shape for image in images] != [image.shape for image in alone]:
            self.problem(f"{mode}: {call.path} answers other images than alone: {call.body}")
            return
        difference = max(int(np.abs(a - b).max()) for a, b in zip(images, alone, strict=True))
        with self._lock:
            self.worst = max(self.worst, difference)
        if difference > LEVELS:
            self.problem(f"{mode}: {call.path} differs by {difference} levels: {call.body}")

    @contextmanager
    def disturbance(self) -> Iterator[None]:
        """While the server is killed and starts again, requests may fail."""
        start = time.monotonic()
        span = [start, float("inf")]
        with self._lock:
            self._disturbed.append((span[0], span[1]))
        try:
            yield
        finally:
            with self._lock:
                self._disturbed[-1] = (start, time.monotonic())

    def excused(self, start: float) -> bool:
        """Whether the server was disturbed at any time since `start`."""
        with self._lock:
            return any(end >= start for _, end in self._disturbed)

    def by_mode(self) -> dict[str, dict[str, int]]:
        table: dict[str, dict[str, int]] = defaultdict(dict)
        for (mode, status), count in sorted(self.answers.items()):
            table[mode][status] = count
        return dict(table)
