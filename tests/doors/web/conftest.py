"""A browser that nobody has used yet, and the page at / in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from tests.support.browser import open_page, profile
from tests.support.server import Server


@pytest.fixture
def context(browser: Browser, server: Server) -> Iterator[BrowserContext]:
    permissions = ["clipboard-read", "clipboard-write"]
    with profile(browser, server.url, permissions=permissions) as context:
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return open_page(context)
