"""The gallery of the page at /: what it keeps, what it cannot keep, and what is deleted."""

from __future__ import annotations

from playwright.sync_api import BrowserContext, Page, expect

from tests.support.browser import open_page
from tests.support.page import fill, make, press, said, shown, thumbnails
from tests.support.server import QUICK, Server

NO_DATABASE = (
    "indexedDB.open = () => { throw new DOMException('not in this window', 'SecurityError'); }"
)
NOT_KEPT = "The browser does not keep this picture"


def test_delete_all_asks_first_and_other_tabs_follow(context: BrowserContext) -> None:
    page, other = open_page(context), open_page(context)
    make(page, Images="2")
    expect(thumbnails(other)).to_have_count(2)
    press(page, "Delete all")
    question = page.get_by_role("dialog", name="Delete all")
    expect(question).to_contain_text("All 2 pictures")
    expect(question.get_by_role("button", name="Keep them")).to_be_focused()
    page.keyboard.press("Escape")
    expect(question).to_be_hidden()
    expect(thumbnails(page)).to_have_count(2)
    press(page, "Delete all")
    question.get_by_role("button", name="Delete all").click()
    for tab in (page, other):
        expect(tab.get_by_role("heading", name="Nothing made yet")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="Nothing made yet")).to_be_visible()


def test_pictures_are_deleted_one_after_the_other_by_keyboard(page: Page) -> None:
    make(page, Images="3")
    page.get_by_role("button", name=f"{QUICK['prompt']}, #7").focus()
    page.keyboard.press("Delete")
    expect(thumbnails(page)).to_have_count(2)
    expect(thumbnails(page).get_by_role("button", pressed=True)).to_be_focused()
    page.keyboard.press("Delete")
    expect(thumbnails(page)).to_have_count(1)
    press(page, "Delete")
    expect(shown(page)).to_have_count(0)


def test_what_a_browser_cannot_keep_is_there_until_the_page_is_closed(
    context: BrowserContext,
) -> None:
    context.add_init_script(NO_DATABASE)
    page = open_page(context)
    make(page, Images="2")
    expect(shown(page)).to_contain_text(NOT_KEPT)
    expect(page.get_by_role("status")).to_contain_text("not in this window")
    press(page, "Delete")
    expect(thumbnails(page)).to_have_count(1)
    press(page, "Undo")
    expect(thumbnails(page)).to_have_count(2)
    press(page, "Delete all")
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(shown(page)).to_have_count(0)


def test_a_full_storage_loses_no_picture(context: BrowserContext, server: Server) -> None:
    devtools = context.new_cdp_session(context.new_page())
    devtools.send("Storage.overrideQuotaForOrigin", {"origin": server.url, "quotaSize": 1})
    page, other = open_page(context), open_page(context)
    make(page)
    expect(shown(page)).to_contain_text(NOT_KEPT)
    expect(page.get_by_role("status")).to_contain_text("its storage is full")
    devtools.send("Storage.overrideQuotaForOrigin", {"origin": server.url})
    make(other, seed=8)
    expect(shown(other)).not_to_contain_text(NOT_KEPT)
    expect(thumbnails(page)).to_have_count(2)  # what the other tab has made does not push it out
    expect(said(page, "Seed")).to_have_text("7")


def test_what_is_looked_at_stays_while_others_are_made(page: Page) -> None:
    make(page)
    make(page, seed=8)
    fill(page, Seed="9", Steps="60")
    press(page, "Generate")
    page.get_by_role("button", name=f"{QUICK['prompt']}, #7").click()
    expect(thumbnails(page)).to_have_count(3)
    expect(said(page, "Seed")).to_have_text("7")
    make(page, seed=10)  # who asks for a picture wants to see it
