"""A real Chromium, driven by what a person finds on a page: the names of its controls."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = "REQUIRE_CHROMIUM"  # set where tests must not be skipped for want of it
LIMIT = 60_000.0  # ms that a page may need on a busy machine


@contextmanager
def browsing() -> Iterator[Browser]:
    """The machine's own Chromium; the test is skipped where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        missing = "the machine has no Chromium (Debian: apt-get install chromium)"
        pytest.fail(missing) if os.environ.get(REQUIRED) else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def profile(browser: Browser, url: str, **options: Any) -> Iterator[BrowserContext]:
    """A browser that nobody has used yet. Its pages ask no host but that of `url`, and no script of
    theirs fails or is forbidden what it tries."""
    wrong: list[str] = []
    asked: set[str] = set()
    missing: list[str] = []
    context = browser.new_context(base_url=url, **options)
    context.set_default_timeout(LIMIT)
    context.on("request", lambda request: asked.add(request.url))
    context.on(
        "response", lambda answer: missing.append(answer.url) if answer.status == 404 else None
    )
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    context.on(
        "console",
        lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None,
    )
    try:
        yield context
        assert not wrong and not missing
        hosts = {urlsplit(one).netloc for one in asked if one.startswith(("http", "ws"))}
        assert hosts <= {urlsplit(url).netloc}
    finally:
        context.close()


def open_page(context: BrowserContext, path: str = "/", model: str = "shapes") -> Page:
    page = context.new_page()
    page.goto(path)
    page.get_by_label("Prompt", exact=True).wait_for()
    page.get_by_role("option", name=model, exact=True).wait_for(state="attached")
    return page
