"""What several tests of real servers use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.collector import Collector, collecting


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector
