"""A job store, once on SQLite and once on PostgreSQL; jobs that run on a fake App."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sdbento.jobs.store.job_store import JobStore
from tests.support.job_server import Server, serving
from tests.support.jobs import Clock
from tests.support.postgres import new_database


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    if request.param == "sqlite":
        return None
    return new_database(request.getfixturevalue("postgres_server"))


@pytest.fixture
def store(tmp_path: Path, clock: Clock, url: str | None) -> Iterator[JobStore]:
    store = JobStore(tmp_path, url, clock=clock)
    yield store
    store.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path) as server:
        yield server
