"""Which client a request comes from, by its address; proxies that are trusted may name it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

OWN_BITS = 64  # of IPv6: whoever has a network of that size has all addresses in it


def client_address(
    peer: str | None, forwarded: Iterable[str], trusted: Sequence[Network]
) -> str | None:
    """What the client counts by whose request came from `peer`: its address, or the /64 of an IPv6
    address. None: `peer` is none, as on a Unix socket.

    forwarded: the X-Forwarded-For headers. Each proxy adds at the end from where it was asked, so
    what a trusted one added is believed, and nothing before it. A client that a proxy does not name
    counts as that proxy.
    """
    client = _read(peer or "")
    hops = [hop for header in forwarded for hop in header.split(",")]
    while hops and client is not None and any(client in network for network in trusted):
        if (named := _read(hops.pop())) is None:
            break
        client = named
    return None if client is None else _counted(client)


def _read(text: str) -> Address | None:
    """`1.2.3.4`, `1.2.3.4:80`, `2001:db8::1` or `[2001:db8::1]:80`; None for anything else."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _counted(address: Address) -> str:
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((int(address), OWN_BITS), strict=False))
