"""Looks up the addresses of host names, each in a thread: the system's resolver has no timeout.

A name server that never answers keeps a thread for as long as the resolver asks it. So an owner has
its share of the threads only, and of these the names of one domain a few.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Future
from ipaddress import ip_address
from threading import Thread

from sdbento.access.caller import Caller
from sdbento.access.places import HostPlaces, TimeLimit
from sdbento.errors import Unavailable
from sdbento.outbound.addresses import Address
from sdbento.outbound.failures import Failed
from sdbento.outbound.urls import as_address, registered_name

LOOKUPS = 256  # at once
LOOKUPS_IN_A_DOMAIN = 8  # of one owner

_places = HostPlaces(LOOKUPS, LOOKUPS_IN_A_DOMAIN)


def look_up(host: str, port: int) -> list[str]:
    """The addresses of `host`, best first. Raises OSError or UnicodeError. Blocking, for long."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def resolve(
    host: str, port: int, caller: Caller, time: TimeLimit, patience: TimeLimit
) -> list[Address]:
    """The addresses of `host`, which `caller` wants to know.

    `time` limits the look-up and `patience` the wait for a thread. Raises Failed, TimeoutError,
    LimitReached, or Unavailable when the system has no more threads.
    """
    if (address := as_address(host)) is not None:
        return [address]
    visit = await _places.take(caller, [registered_name(host)], patience)
    found: Future[list[str]] = Future()
    found.set_running_or_notify_cancel()  # from here on it cannot be cancelled

    def work() -> None:
        try:
            found.set_result(look_up(host, port))
        except Exception as error:
            found.set_exception(error)
        finally:
            _places.give_back(visit)  # not before: a thread that nobody waits for is one as well

    try:
        Thread(target=work, name="sdbento-dns", daemon=True).start()
    except RuntimeError as error:
        _places.give_back(visit)
        raise Unavailable("the server has no more threads to look up names") from error
    try:
        async with time.running():
            addresses = await asyncio.wrap_future(found)
        return [ip_address(address) for address in addresses]
    except TimeoutError:
        raise
    except (OSError, ValueError) as error:  # UnicodeError is a ValueError
        raise Failed("its host name cannot be resolved") from error
