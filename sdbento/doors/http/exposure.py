"""Whether others than this machine can reach the server though it asks for no key."""

from __future__ import annotations

import ipaddress
import logging
from typing import Any

import psutil

from sdbento.access.keyring import Keyring
from sdbento.settings import Settings

log = logging.getLogger(__name__)

ADVICE = (
    "whoever can reach it may use it; SDBENTO_API_KEY sets a key, `sdbento keys add` makes one for "
    "each user"
)


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address; a name that is not one is `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_exposed(port: int | None) -> bool:
    """Whether this process listens on `port` of more than loopback. None: a Unix socket, which is
    there for a proxy. Blocking, for milliseconds."""
    return port is None or not all(
        is_local(address.ip) for address in _listening() if address.port == port
    )


def warn_if_open(settings: Settings) -> None:
    """Say so in the log if this process listens on more than loopback, and there are no keys.

    BentoML passes the socket that it listens on to its worker, without a word on its address.
    Raises SettingsError if the file of keys cannot be read.
    """
    if Keyring(settings).required:
        return
    if outside := sorted({one.ip for one in _listening() if not is_local(one.ip)}):
        log.warning("the server listens on %s without a key: %s", ", ".join(outside), ADVICE)


def _listening() -> list[Any]:
    """The addresses, each with `ip` and `port`, that this process listens on."""
    sockets = psutil.Process().net_connections("inet")
    return [one.laddr for one in sockets if one.status == psutil.CONN_LISTEN]
