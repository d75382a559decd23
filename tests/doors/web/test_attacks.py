"""The page at / among hostile files, lost connections and too much at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, expect

from tests.support.browser import open_page, profile
from tests.support.page import (
    LONG,
    drop,
    fill,
    make,
    png,
    press,
    requests_of,
    shown,
    until_idle,
)
from tests.support.server import Server, free_port, serving

HOSTILE: list[Any] = [
    {"prompt": {"a": 1}, "lora": [None, {"model_id": {"x": 1}, "weight": "<b>"}]},
    {"prompt": "x", "controlnet": [None, {"type": 5, "image": 7}], "hires": "abc"},
    {"prompt": "x", "width": [1], "model": {"a": 2}, "output_format": ["exe"], "scheduler": 5},
    {"prompt": "x", "image": "https://example.org/x.png", "mask_image": {"a": 1}},
    ["a", "list"],
]


def test_no_file_breaks_the_form(page: Page) -> None:
    for said in HOSTILE:
        drop(page, png(sdbento=json.dumps(said)))
        restored = page.get_by_role("status").or_(page.get_by_alt_text("The image to start from"))
        expect(restored.first).to_be_visible()
        page.reload()
        press(page, "Reset")
    make(page)


def test_what_is_no_picture_is_said_to_be_none(page: Page) -> None:
    drop(page, b"hello", kind="text/plain")
    expect(page.get_by_role("status")).to_contain_text("This file is no image.")
    press(page, "Close this message")
    drop(page, b"hello")
    expect(page.get_by_role("status")).to_contain_text("no image that the browser can show")


def test_a_prompt_is_text_and_nothing_else(page: Page) -> None:
    prompt = "<img src=x onerror=alert(1)> 🌋 شكل أحمر"
    fill(page, Prompt=prompt, Steps="2")
    press(page, "Generate")
    expect(shown(page).get_by_text(prompt)).to_be_visible()


def test_many_generations_leave_connections_for_the_rest(
    page: Page, context: BrowserContext, server: Server
) -> None:
    bodies = requests_of(page)
    fill(page, Prompt="a white ring", **LONG)
    for _ in range(10):
        press(page, "Generate")
    expect(page.get_by_text("Waiting until other pictures are done")).to_have_count(6)
    assert len(bodies) == 4
    open_page(context).close()
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    expect(page.get_by_text("Waiting until other pictures are done")).to_have_count(5)
    for left in range(8, -1, -1):
        page.keyboard.press("Escape")
        expect(page.get_by_role("progressbar")).to_have_count(left)
    until_idle(server)


def test_two_tabs_leave_connections_for_the_rest(context: BrowserContext, server: Server) -> None:
    tabs = [open_page(context), open_page(context)]
    sent = [requests_of(tab) for tab in tabs]
    for tab in tabs:
        fill(tab, Prompt="a white ring", **LONG)
        for _ in range(4):
            press(tab, "Generate")
    waits = "Waiting until other pictures are done"
    expect(tabs[0].get_by_text(waits)).to_have_count(0)
    expect(tabs[1].get_by_text(waits)).to_have_count(3)
    assert [len(bodies) for bodies in sent] == [4, 1]
    open_page(context).close()  # another request, while all of them run
    tabs[0].close()
    expect(tabs[1].get_by_text(waits)).to_have_count(0)
    for left in range(3, -1, -1):
        tabs[1].keyboard.press("Escape")
        expect(tabs[1].get_by_role("progressbar")).to_have_count(left)
    until_idle(server)


def test_what_a_reload_interrupts_can_be_made_again(page: Page, server: Server) -> None:
    fill(page, Prompt="a white ring", Seed="12345678901234567", **LONG)
    press(page, "Generate")
    expect(page.get_by_text("of 150, about")).to_be_visible()
    asked: list[str] = []

    def agree(dialog: Dialog) -> None:
        asked.append(dialog.type)
        dialog.accept()

    page.on("dialog", agree)
    page.reload()
    assert asked == ["beforeunload"]
    expect(page.get_by_role("alert")).to_contain_text("closed or loaded again")
    until_idle(server)
    bodies = requests_of(page)
    press(page, "Try again")
    expect(page.get_by_role("progressbar")).to_be_visible()
    assert bodies[0]["seed"] == 12345678901234567 and bodies[0]["num_images"] == 2
    press(page, "Cancel")
    until_idle(server)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_server_that_dies_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, port=port) as server:
        server.wait_until_ready()
        with profile(browser, server.url) as context:
            page = open_page(context)
            fill(page, Prompt="a white ring", **LONG)
            press(page, "Generate")
            expect(page.get_by_text("of 150, about")).to_be_visible()
            server.kill()
            expect(page.get_by_role("alert")).to_have_text("The connection to the server was lost.")
            press(page, "Try again")
            expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
            with serving(tmp_path, port=port) as next_server:
                next_server.wait_until_ready()
                press(page, "Try again")
                expect(page.get_by_text("of 150, about")).to_be_visible()
                press(page, "Cancel")
                until_idle(next_server)
