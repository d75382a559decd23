"""Whether others than this machine can reach the server, and what that means for the settings."""

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


def decide_any_model(settings: Settings) -> Settings:
    """The settings, with `allow_any_model` decided if the operator has not: only if this process
    listens on loopback and nowhere else. Says in the log what it is, and why."""
    if settings.allow_any_model is not None:
        return settings
    hosts = sorted({one.ip for one in _listening()})
    allowed = bool(hosts) and all(map(is_local, hosts))
    log.info(ANY_MODEL[allowed], ", ".join(hosts) or "nothing that is known")
    return settings.model_copy(update={"allow_any_model": allowed})


ANY_MODEL = {
    True: "requests may name any model: the server listens on %s, where only this machine can "
    "reach it (SDBENTO_ALLOW_ANY_MODEL=false forbids it, as behind a proxy)",
    False: "requests may name only models that this server knows: it listens on %s, and others can "
    "reach it (SDBENTO_ALLOW_ANY_MODEL, SDBENTO_HUB_OWNERS permit more)",
}


def _listening() -> list[Any]:
    """The addresses, each with `ip` and `port`, that this process listens on."""
    sockets = psutil.Process().net_connections("inet")
    return [one.laddr for one in sockets if one.status == psutil.CONN_LISTEN]
