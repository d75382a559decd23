"""Whether a server could listen: on IPv4 and IPv6, on a free port and on one that is taken."""

from __future__ import annotations

import socket

import pytest

from sdbento.doors.cli.ports import listening_problem
from tests.support.server import free_port


def test_a_free_port_is_no_problem() -> None:
    assert listening_problem("127.0.0.1", free_port()) is None


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_port_in_use_is_a_problem(family: socket.AddressFamily, host: str) -> None:
    if family == socket.AF_INET6 and listening_problem("::1", free_port()) is not None:
        pytest.skip("the machine has no IPv6")
    with socket.create_server((host, 0), family=family) as taken:
        assert listening_problem(host, taken.getsockname()[1]) == "address already in use"


def test_an_address_of_another_machine_is_a_problem() -> None:
    assert listening_problem("192.0.2.1", free_port()) == "cannot assign requested address"
