"""How much of the server a client may have: bytes, seconds, connections. Values, and nothing else.

They are wider than any client needs, so that no operator has to know them; what a proxy in front
should bound more tightly is told in docs/security.md.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass, field

MAX_CONNECTIONS = 1000


def _possible_connections() -> int:
    """Half of the files that the process may open at most: it needs some for itself."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft < 0 else max(2, min(MAX_CONNECTIONS, soft // 2))


@dataclass(frozen=True)
class Limits:
    """Of connections to one port."""

    # Of which one address gets half, `has_share`.
    connections: int = field(default_factory=_possible_connections)
    refused_connections: int = 100  # beyond those: each is given a moment to read why
    url_bytes: int = 8 * 1024  # as nginx has it, and the next
    head_bytes: int = 32 * 1024  # request line and headers, and trailers too
    headers: int = 100
    pipelined: int = 10  # requests that are sent before the answer to the first has come
    head_seconds: float = 20.0
    # A body that comes more slowly than `body_rate` bytes a second eats up this many seconds of
    # patience, which it gets back when it is faster. One that does not come at all has just these.
    body_seconds: float = 20.0
    body_rate: float = 8 * 1024  # bytes per second; ISDN
    # The same for answers, of which clients have to take half of what the slowest line does.
    send_seconds: float = 30.0
    send_rate: float = 4 * 1024  # bytes per second
    untaken_bytes: int = 2**30  # of answers, all together, that clients have not taken
    linger_seconds: float = 5.0  # for the rest of a body that was answered before its end
    sweep_seconds: float = 1.0  # between two looks at all connections
