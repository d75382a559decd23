"""Stores of several servers on one PostgreSQL database, as many as a test opens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sdbento.jobs.results import Results
from sdbento.jobs.store.job_store import JobStore
from tests.support.postgres import new_database

OpenStore = Callable[..., JobStore]


@pytest.fixture
def database(postgres_server: str) -> str:
    return new_database(postgres_server)


@pytest.fixture
def open_store(tmp_path: Path, database: str) -> Iterator[OpenStore]:
    """Open the store of another server; all are closed in the end."""
    numbers = count()
    with ExitStack() as stores:

        def opened(**options: Any) -> JobStore:
            folder = tmp_path / f"server-{next(numbers)}"
            options = {"results": Results(tmp_path / "results")} | options
            store = JobStore(folder, database, **options)
            return stores.enter_context(closing(store))

        yield opened
