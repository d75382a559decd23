"""Takes the pictures of the page that the documents show: python -m tests.screenshots"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.doors.web.test_batch import asked
from tests.support.browser import browsing, open_page, profile
from tests.support.server import ROOT, Server, serving

IMAGES = ROOT / "docs" / "images"
PROMPTS = (
    "a penguin on a light blue background",
    "a robot on a purple background, flat style",
    "a pineapple on a pink background",
    "a ghost on an orange background",
    "a red apple on a blue background",
)
OUTLINE = {"lora": [{"model_id": "emoji-outline"}], "num_images": 3, "num_inference_steps": 100}
BATCH = (  # small images, for which large batches pay on a CPU, too
    ("127.0.0.1", {"prompt": "a red apple", "scheduler": "Euler a"}),
    ("127.0.0.2", {"prompt": "another's", "scheduler": "UniPC", "num_inference_steps": 120}),
    ("127.0.0.1", {"prompt": "a green frog", "scheduler": "DPM++ 2M Karras"} | OUTLINE),
    ("127.0.0.1", {"prompt": "a pizza", "num_images": 8, "num_inference_steps": 60}),
)


def make(page: Page, prompt: str, seed: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("article", name="The picture shown").get_by_role("img", name=prompt).wait_for()


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), SD_MODEL="emoji") as server,
        browsing() as browser,
    ):
        server.wait_until_ready()
        size = {"width": 1280, "height": 800}
        with profile(browser, server.url, viewport=size, color_scheme="light") as context:
            page = open_page(context, model="emoji")
            for seed, prompt in enumerate(PROMPTS):
                make(page, prompt, seed)
            page.get_by_role("heading", name="sdbento").click()
            page.screenshot(path=IMAGES / "page.png")
            show_batch(page, server)


def show_batch(page: Page, server: Server) -> None:
    """The tab "Batch" with requests of two clients."""
    page.get_by_role("tab", name="Batch").click()
    with ExitStack() as asking:
        for address, fields in BATCH:
            asking.enter_context(asked(server, address, width=64, height=64, **fields))
            page.wait_for_timeout(300)
        seats = page.locator(".seat")
        expect(seats.nth(5)).to_be_visible()
        page.wait_for_timeout(500)  # until all have come in
        page.screenshot(path=IMAGES / "page-batch.png")


if __name__ == "__main__":
    main()
