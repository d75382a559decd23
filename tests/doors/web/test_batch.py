"""The tab "Batch" of the page at /, in a real Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from tests.support.browser import LIMIT, open_page, profile
from tests.support.server import QUICK, Server

LONG = {**QUICK, "num_inference_steps": 150, "width": 128, "height": 128}
PHONE = {"width": 390, "height": 844}
WIDTH = "document.documentElement.scrollWidth"

expect.set_options(timeout=LIMIT)


@contextmanager
def asked(server: Server, address: str, **fields: Any) -> Iterator[None]:
    """A long request from `address`, for as long as the block runs."""
    transport = httpx.HTTPTransport(local_address=address)
    client = httpx.Client(base_url=server.url, transport=transport, timeout=120)

    def ask() -> None:
        with client.stream("POST", "/generate_stream", json=LONG | fields) as events:
            for _ in events.iter_lines():
                if stopped.done():
                    return

    stopped: Future[None] = Future()
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(ask)
        try:
            yield
        finally:
            stopped.set_result(None)
            asking.result(60)
            client.close()


def batch_of(context: BrowserContext) -> Page:
    page = open_page(context)
    page.get_by_role("tab", name="Batch").click()
    return page


def rows(page: Page) -> Locator:
    return page.get_by_role("table", name="Images in the batch").get_by_role("row")


def test_it_shows_who_is_in_the_batch_and_how_far(context: BrowserContext, server: Server) -> None:
    page = batch_of(context)
    expect(page.get_by_text("Nothing runs.")).to_be_visible()
    lora = [{"model_id": "outline", "weight": 1.0}]
    with (
        asked(server, "127.0.0.1", prompt="a wish of mine", scheduler="Euler a", lora=lora),
        asked(server, "127.0.0.2", prompt="a secret", scheduler="Heun"),
    ):
        mine = rows(page).filter(has_text="a wish of mine")
        expect(mine).to_contain_text("Euler a + LoRA outline")
        expect(rows(page).filter(has_text="another's")).to_contain_text("Heun")
        expect(page.get_by_text("a secret")).to_have_count(0)
        expect(mine).to_contain_text("shapes, 128 × 128")
        before = mine.inner_text()
        expect(mine).not_to_have_text(before)  # it goes on
    expect(page.get_by_text("Nothing runs.")).to_be_visible()
    expect(page.locator(".seat")).to_have_count(0)  # those that leave are shown for a moment only


def test_what_waits_is_listed(context: BrowserContext, server: Server) -> None:
    page = batch_of(context)
    with (
        asked(server, "127.0.0.1", prompt="first", num_images=16),
        asked(server, "127.0.0.1", prompt="second", num_images=16),
    ):
        waiting = page.get_by_role("heading", name="Waiting").locator("..")
        expect(waiting.get_by_role("listitem").first).to_contain_text("image")
        resident = re.compile(r"In memory: .*\bshapes \(0\.01 GB\)")
        expect(page.get_by_text(resident)).to_be_visible()


def test_it_watches_only_while_one_looks(context: BrowserContext) -> None:
    page = batch_of(context)
    expect(page.get_by_text("In the batch", exact=True)).to_be_visible()
    with page.expect_event("requestfailed", lambda one: one.url.endswith("/batch")):
        page.get_by_role("tab", name="Pictures").click()


def test_it_says_why_it_cannot_watch_and_tries_again(context: BrowserContext) -> None:
    refusals = [1]

    def refuse(route: Route) -> None:
        if not refusals:
            route.continue_()
            return
        refusals.pop()
        error = {"type": "overloaded", "message": "16 clients watch already", "param": None}
        headers = {"Retry-After": "1"}
        route.fulfill(status=429, json={"error": error}, headers=headers)

    context.route("**/batch", refuse)
    page = batch_of(context)
    expect(page.get_by_role("alert")).to_have_text("16 clients watch already")
    expect(page.get_by_text("Nothing runs.")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_it_fits_a_phone(
    browser: Browser, server: Server, scheme: Any
) -> None:
    from axe_playwright_python.base import AXE_SCRIPT

    options: dict[str, Any] = {"viewport": PHONE, "color_scheme": scheme}
    with (
        profile(browser, server.url, reduced_motion="reduce", **options) as context,
        asked(server, "127.0.0.1", prompt="a long wish " * 10, num_images=4),
        asked(server, "127.0.0.2", num_images=16),
    ):
        page = batch_of(context)
        expect(page.locator(".seat").first).to_be_visible()
        assert page.evaluate(WIDTH) == PHONE["width"]
        page.evaluate(AXE_SCRIPT)
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        assert not grave, json.dumps([(one["id"], one["nodes"]) for one in grave], indent=1)
