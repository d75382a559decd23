"""By which address a client counts, with and without proxies before the server."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sdbento.access.addresses import Address, client_address

PROXIES = tuple(map(ip_network, ("127.0.0.1", "10.0.0.0/8", "fd00::/8")))


@pytest.mark.parametrize(
    ("peer", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        (None, None),
        ("", None),
    ],
)
def test_clients_count_by_address_or_network(peer: str | None, counted: str | None) -> None:
    assert client_address(peer, [], PROXIES) == counted


@pytest.mark.parametrize(
    ("peer", "forwarded"),
    [
        ("10.1.1.1", ["192.0.2.1"]),
        ("::ffff:10.1.1.1", ["192.0.2.1"]),
        ("fd00::5", ["192.0.2.1"]),
        ("10.1.1.1", ["192.0.2.1:4711"]),
        ("10.1.1.1", ["::ffff:192.0.2.1"]),
        ("10.1.1.1", ["[::ffff:192.0.2.1]:80"]),
        ("10.1.1.1", ["198.51.100.7, 192.0.2.1"]),  # the client says so, or somebody before it
        ("10.1.1.1", ["198.51.100.7", "192.0.2.1"]),
        ("10.1.1.1", ["192.0.2.1, 10.2.2.2", "fd00::1,127.0.0.1"]),
        ("10.1.1.1", ["unknown, 192.0.2.1 ,10.2.2.2"]),
        ("192.0.2.1", ["198.51.100.7"]),  # no proxy that we know
        ("192.0.2.1", ["127.0.0.1"]),
    ],
)
def test_what_trusted_proxies_add_is_believed_and_nothing_before_it(
    peer: str, forwarded: list[str]
) -> None:
    assert client_address(peer, forwarded, PROXIES) == "192.0.2.1"


@pytest.mark.parametrize("last", ["unknown", "", "_hidden", "[::1.2]", "1.2.3", "a.example:80"])
def test_a_client_whom_the_proxy_does_not_name_counts_as_the_proxy(last: str) -> None:
    assert client_address("10.1.1.1", [f"192.0.2.1, {last}"], PROXIES) == "10.1.1.1"
    assert client_address("10.1.1.1", [f"{last}, 10.2.2.2"], PROXIES) == "10.2.2.2"


def test_a_client_among_the_proxies_counts_by_its_own_address() -> None:
    assert client_address("10.1.1.1", [], PROXIES) == "10.1.1.1"
    assert client_address("10.1.1.1", ["10.3.3.3"], PROXIES) == "10.3.3.3"


def test_nobody_is_trusted_who_is_not_named() -> None:
    assert client_address("127.0.0.1", ["192.0.2.1"], ()) == "127.0.0.1"


# Whatever clients write into the header

WRITTEN = st.lists(st.text(st.sampled_from("0123456789abf.:,[]% \u00b2"), max_size=30), max_size=4)


@given(st.ip_addresses(), WRITTEN)
def test_nobody_changes_who_he_is_by_what_he_writes(client: Address, written: list[str]) -> None:
    assume(not any(client in network for network in PROXIES))
    alone = client_address(str(client), [], PROXIES)
    assert client_address(str(client), written, PROXIES) == alone
    for added in (f"{client}", f" {client} ", f"[{client}]:80" if client.version == 6 else client):
        assert client_address("10.1.1.1", [*written, str(added)], PROXIES) == alone
        joined = [",".join([*written, str(added), "10.9.9.9"])]
        assert client_address("10.1.1.1", joined, PROXIES) == alone


@given(st.text(max_size=40) | st.ip_addresses().map(str), WRITTEN)
def test_any_text_is_an_address_or_none(peer: str, written: list[str]) -> None:
    counted = client_address(peer, written, PROXIES)
    assert counted is None or ip_network(counted).num_addresses in (1, 2**64)
