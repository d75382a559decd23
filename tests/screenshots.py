"""Takes the pictures of the page that the documents show: python -m tests.screenshots"""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import Page

from tests.support.browser import browsing, open_page, profile
from tests.support.server import ROOT, serving

IMAGES = ROOT / "docs" / "images"
PROMPTS = (
    "a large yellow star on a black background",
    "a small white ring on a purple background",
    "a large green triangle on an orange background",
    "a large blue cross on a yellow background",
    "a large red circle on a blue background",
)


def make(page: Page, prompt: str, seed: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("article", name="The picture shown").get_by_role("img", name=prompt).wait_for()


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder)) as server,
        browsing() as browser,
    ):
        server.wait_until_ready()
        size = {"width": 1280, "height": 800}
        with profile(browser, server.url, viewport=size, color_scheme="light") as context:
            page = open_page(context)
            for seed, prompt in enumerate(PROMPTS):
                make(page, prompt, seed)
            page.get_by_role("heading", name="sdbento").click()
            page.screenshot(path=IMAGES / "page.png")


if __name__ == "__main__":
    main()
