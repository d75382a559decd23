"""`sdbento.process.heavy_imports`: the garbage collector skips what is imported inside
and collects what is made later."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from sdbento.process.heavy_imports import without_collector


class Loop:
    """Garbage that only the collector can find."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_objects_made_inside_are_never_examined_again() -> None:
    with without_collector():
        assert not gc.isenabled()
        imported = weakref.ref(Loop())
    assert gc.isenabled()
    gc.collect()
    assert imported() is not None


def test_a_model_loaded_afterwards_is_collected() -> None:
    with without_collector():
        pass
    model = weakref.ref(Loop())
    gc.collect()
    assert model() is None


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), without_collector():
        raise ImportError
    assert gc.isenabled()
