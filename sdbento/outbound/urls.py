"""URLs from requests: what can be said of them without asking anybody."""

from __future__ import annotations

import re
from contextlib import suppress
from ipaddress import ip_address

import httpx

from sdbento.outbound.addresses import Address, is_global
from sdbento.outbound.failures import Failed, explained
from sdbento.settings import Settings

MAX_PORT = 65535
MAX_NAME = 253  # characters of a host's name (RFC 1035, 2.3.4)
SECOND_LEVEL = ("ac", "co", "com", "edu", "go", "gob", "gov", "mil", "ne", "net", "or", "org")
_NAME = re.compile(r"(?=.*[a-z0-9])[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


def is_url(source: str) -> bool:
    """Whether a field that may also hold a name, a data URI or base64 holds a URL."""
    return source.lstrip()[:8].lower().startswith(("https://", "http://"))


def check_fetch(url: str, settings: Settings, *, param: str) -> None:
    """Raise what `fetch` would raise for a URL that it refuses without a connection.

    A host name is not looked up.
    """
    _check_url(url, settings, f"{param} could not be fetched from", param)


def check_send(url: str, settings: Settings, *, param: str) -> None:
    """Raise InvalidParameter for a URL that `send` would refuse without a connection.

    A host name is not looked up.
    """
    _check_url(url, settings, f"{param}: nothing can be sent to", param)


def _check_url(url: str, settings: Settings, problem: str, param: str) -> None:
    target: httpx.URL | None = None
    try:
        target = parse(url)
        check(target, settings)
    except Failed as error:
        raise explained(error, problem, target, settings, param) from error


def parse(url: str) -> httpx.URL:
    """Raises Failed."""
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise Failed("it is not valid") from error


def join(target: httpx.URL, location: str) -> httpx.URL:
    """Where `target` redirects to. Raises Failed."""
    try:
        return target.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise Failed("it redirects to a URL that is not valid") from error


def host_of(target: httpx.URL) -> str:
    """The host as it is looked up, in ASCII. `target.host` would decode it, and fails for some."""
    return target.raw_host.decode("ascii")


def registered_name(host: str) -> str:
    """What one owner has all names of, as nearly as that can be told without a list of all
    registries: the last two labels, or three below the likes of co.uk."""
    labels = host.rstrip(".").lower().split(".")
    country = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in SECOND_LEVEL
    return ".".join(labels[-3 if country else -2 :])


def check(target: httpx.URL, settings: Settings) -> None:
    """Raises Failed for what is refused without a connection."""
    host = host_of(target)
    if target.scheme not in ("https", "http") or not host:
        raise Failed("only https URLs are accepted")
    if target.scheme == "http" and not settings.allow_private_urls:
        raise Failed("http is refused, use https; SDBENTO_ALLOW_PRIVATE_URLS=true permits it")
    if target.port is not None and not 0 < target.port <= MAX_PORT:
        raise Failed(f"its port is not one of 1 to {MAX_PORT}")
    if (address := as_address(host)) is not None:
        check_addresses([address], settings)
    elif len(host) > MAX_NAME or not _NAME.fullmatch(host):
        raise Failed("its host is not valid")
    if target.userinfo:
        raise Failed("a URL must not carry a user name or password")


def as_address(host: str) -> Address | None:
    """The address that `host` is; None: a name, which is looked up only to connect to it."""
    with suppress(ValueError):
        return ip_address(host)
    return None


def check_addresses(addresses: list[Address], settings: Settings) -> None:
    """Raises Failed unless requests may reach all of them."""
    if not settings.allow_private_urls and not all(is_global(address) for address in addresses):
        raise Failed(
            "its address is private or reserved; SDBENTO_ALLOW_PRIVATE_URLS=true permits it"
        )
