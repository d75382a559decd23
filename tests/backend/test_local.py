"""One device in this process."""

from __future__ import annotations

import asyncio

from sdbento.app import App
from sdbento.environment import load_settings
from tests.support.fakes import FakeRunner
from tests.support.local import local


async def test_a_model_that_was_loaded_early_is_leased_by_nobody() -> None:
    app = App(load_settings(sd_model="shapes"), FakeRunner())
    try:
        await asyncio.wrap_future(app.backend.preload(app.catalog.resolve("shapes")))
        assert [(key, leased) for key, _, leased in local(app).pipelines.loaded()] == [
            ("shapes", False)
        ]
    finally:
        await asyncio.to_thread(app.close)
