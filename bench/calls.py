"""The calls that a device was given: recorded one by one, and what they say of packing.

The costs of calls are fitted to the same log that they judge, so that nothing is compared with a
timing of another minute.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from sdbento.catalog.families import VAE_FACTOR
from sdbento.engine.trajectory import Launched, Runner, Stage, StepPlan, StepResult

ENOUGH = 3  # timings of a row count, for its cost to be believed


@dataclass(frozen=True)
class Call:
    """`key` names the model and the latent size; `rows` are images of anything but a step."""

    stage: str
    key: str
    side: int
    rows: int
    began: float  # time.monotonic
    seconds: float


def record(runner: Runner, note: Callable[[Call], None]) -> None:
    """Let `runner` tell `note` of every plan, once its result is read."""
    launch = runner.launch

    def launch_noted(plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        began = time.monotonic()
        return _Noted(launch(plan, pause), plan, began, note)

    runner.launch = launch_noted  # type: ignore[method-assign]


class _Noted:
    """A launched plan that tells of itself."""

    def __init__(
        self, launched: Launched, plan: StepPlan, began: float, note: Callable[[Call], None]
    ) -> None:
        self._launched = launched
        self._plan = plan
        self._began = began
        self._note = note

    @property
    def done(self) -> bool:
        return self._launched.done

    def wait(self) -> StepResult:
        result = self._launched.wait()
        key, stage = self._plan.key, self._plan.stage
        name = f"{key.model} {key.latent_height}x{key.latent_width} {key.text_chunks}"
        side = VAE_FACTOR * key.latent_width
        self._note(Call(stage.value, name, side, self._plan.size, self._began, result.seconds))
        return result


class CallLog:
    """A file of calls that one process writes and another reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_read = 0

    def add(self, call: Call) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(call)) + "\n")

    def new(self) -> list[Call]:
        """What was added since the last time."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        fresh, self._num_read = lines[self._num_read :], len(lines)
        return [Call(**json.loads(line)) for line in fresh]


class Curve:
    """Seconds of a step by key and rows: the medians of a log."""

    def __init__(self, calls: Iterable[Call]) -> None:
        timings: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for call in _steps(calls):
            timings[call.key][call.rows].append(call.seconds)
        self.by_key: dict[str, dict[int, float]] = {
            key: {rows: median(seconds) for rows, seconds in sorted(by_rows.items())}
            for key, by_rows in timings.items()
        }
        self._best = {key: _best_row(by_rows) for key, by_rows in timings.items()}

    def packing(self, calls: Iterable[Call]) -> float:
        """What the rows of these steps would have cost in calls of the best size, as a share of
        what they cost as they were."""
        steps = _steps(calls)
        best = sum(self._best[call.key] * call.rows for call in steps)
        return best / sum(self.by_key[call.key][call.rows] for call in steps)


def overhead(rounds: Sequence[Sequence[Call]]) -> float:
    """The share of time outside calls, in rounds that keep the device busy from first to last."""
    span = sum(max(c.began + c.seconds for c in calls) - calls[0].began for calls in rounds)
    return 1 - sum(call.seconds for calls in rounds for call in calls) / span


def _steps(calls: Iterable[Call]) -> list[Call]:
    return [call for call in calls if call.stage == Stage.STEP]


def _best_row(timings: dict[int, list[float]]) -> float:
    """Seconds a row at the best row count, of those that were timed often enough."""
    believed = {rows: seconds for rows, seconds in timings.items() if len(seconds) >= ENOUGH}
    return min(median(seconds) / rows for rows, seconds in (believed or timings).items())
