"""Which addresses are on the public internet, and which of them are one host's."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

NAT64 = ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ip_network("2000::/3")  # all that IANA has handed out of IPv6
# Addresses that `ipaddress` calls global in some versions of Python, or that a cloud uses for
# itself.
SPECIAL = [
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # shared by a carrier's customers; Alibaba's metadata
        "168.63.129.16/32",  # Azure's host, at a public address
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation, like the next
        "3fff::/20",
    )
]
SITE_BITS = 48  # of an IPv6 address: whoever has one has all of them

Address = IPv4Address | IPv6Address


def is_global(address: Address) -> bool:
    """Whether `address`, and the IPv4 address it may embed, is on the public internet."""
    if isinstance(address, IPv6Address):
        if (embedded := _embedded(address)) is not None:
            return is_global(embedded)
        if address not in GLOBAL_UNICAST:
            return False
    special = any(address in network for network in SPECIAL)
    return address.is_global and not address.is_multicast and not special


def site(address: Address) -> str:
    """What one host may have all addresses of: an IPv4 address, or a /48 of IPv6."""
    if isinstance(address, IPv4Address):
        return str(address)
    if (embedded := _embedded(address)) is not None:
        return str(embedded)
    return str(ip_network((int(address), SITE_BITS), strict=False))


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets for `address` may be forwarded to."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour
