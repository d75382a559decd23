"""Fixtures of the tests of the model cache and of offloading."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sdbento.models import cache as model_cache
from sdbento.models.memory import offload
from sdbento.models.pipeline import Pipeline
from tests.support.fake_loader import FakeLoader


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Moves between devices, recorded instead of made."""
    made: list[tuple[str, str]] = []

    def move(where: str) -> Callable[..., Pipeline]:
        def note(pipeline: Pipeline, *_: object) -> Pipeline:
            made.append((pipeline.spec.name, where))
            return pipeline

        return note

    monkeypatch.setattr(offload, "to_host", move("host"))
    monkeypatch.setattr(offload, "to_device", move("device"))
    monkeypatch.setattr(offload, "has_room", lambda nbytes: True)
    monkeypatch.setattr(model_cache, "free_unused", lambda device: None)
    return made
