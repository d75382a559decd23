"""What an engine process and the process that serves tell each other. Both are ours: see `channel`.

A request is known by its number, which the process that serves gives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from sdbento.access.caller import Caller
from sdbento.backend.protocol import ResidentSpec
from sdbento.catalog.specs import ModelSpec
from sdbento.engine.forecast import Ending
from sdbento.engine.handle import Calls, EngineEvent
from sdbento.engine.trajectory import Stage
from sdbento.errors import SDBentoError
from sdbento.live.snapshot import Snapshot
from sdbento.metrics.exposition import Snapshot as Counted
from sdbento.request.resolved import ResolvedRequest
from sdbento.settings import Settings

# To an engine process.


@dataclass(frozen=True)
class Configure:
    """The first message. `name`: of the device, for the log."""

    settings: Settings
    name: str


@dataclass(frozen=True, eq=False)
class Begin:
    """Make the images of a request."""

    number: int
    request: ResolvedRequest
    caller: Caller


@dataclass(frozen=True)
class Listen:
    """Tell of a request's steps from now on."""

    number: int


@dataclass(frozen=True)
class Preview:
    """Make previews of a request every `num_steps` steps."""

    number: int
    num_steps: int


@dataclass(frozen=True)
class Preload:
    """Load a model before a request needs it."""

    number: int
    spec: ModelSpec
    caller: Caller


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for a request, or a preload, any more."""

    number: int


@dataclass(frozen=True)
class Observe:
    """Begin to send snapshots, or end it."""

    wanted: bool


@dataclass(frozen=True)
class GiveUp:
    """Fail all requests."""


@dataclass(frozen=True)
class Close:
    """Finish what is under way for up to `grace` seconds, and end."""

    grace: float


# From an engine process.


@dataclass(frozen=True)
class Submitted:
    """The models of a request are in memory, and the engine has it since `at`, by the monotonic
    clock, which all processes of a machine share."""

    number: int
    own_sampler: str
    warnings: tuple[str, ...]
    at: float


@dataclass(frozen=True, eq=False)
class Happened:
    number: int
    event: EngineEvent


@dataclass(frozen=True, eq=False)
class Finished:
    """All images of a request are there. `calls`: as a Handle has them."""

    number: int
    images: list[Image.Image]
    calls: dict[Stage, Calls]


@dataclass(frozen=True, eq=False)
class Failed:
    """`calls`: those that were made before."""

    number: int
    error: SDBentoError
    calls: dict[Stage, Calls]


@dataclass(frozen=True)
class Loaded:
    """A preload is over, whether it has worked or not."""

    number: int


@dataclass(frozen=True)
class Report:
    """How an engine process is, told twice a second. `room`: bytes that are free for models.
    `counted`: its metrics. `calls`: as far as they are made, of requests that are not done, by the
    number of each."""

    is_ready: bool
    endings: tuple[Ending, ...]
    residents: tuple[ResidentSpec, ...]
    room: int
    counted: Counted = field(default_factory=dict)
    calls: dict[int, dict[Stage, Calls]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Observed:
    """None: there will be no more, because of a bug."""

    snapshot: Snapshot | None


@dataclass(frozen=True)
class Lost:
    """The device or the engine has failed for good: only a new process can go on."""

    reason: str


Message = (
    Configure
    | Begin
    | Listen
    | Preview
    | Preload
    | Cancel
    | Observe
    | GiveUp
    | Close
    | Submitted
    | Happened
    | Finished
    | Failed
    | Loaded
    | Report
    | Observed
    | Lost
)
