"""Three real servers behind nginx on one PostgreSQL, each of which is killed, frozen or away."""

from __future__ import annotations

import pytest

from tests.soak import fleet
from tests.support import nginx, postgres


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not nginx.is_installed(), reason="the machine has no nginx")
@pytest.mark.skipif(not postgres.is_installed(), reason="the machine has no PostgreSQL")
def test_nothing_is_lost_or_done_twice_when_servers_and_database_fail() -> None:
    assert fleet.run(30, {"kill": 2, "database": 1, "freeze": 1}, seed=7) == 0
