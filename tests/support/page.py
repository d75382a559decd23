"""The page at /, used as a person uses it: by the names of what is on it."""

from __future__ import annotations

import base64
import json
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Locator, Page, expect

from tests.support.browser import LIMIT
from tests.support.server import QUICK, Server

LONG = {"Steps": "150", "Images": "2"}
DROP = """({data, type}) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "dropped", {type}));
    for (const name of ["dragover", "drop"]) {
        const how = {bubbles: true, cancelable: true, dataTransfer: transfer};
        const event = new DragEvent(name, how);
        document.querySelector("main").dispatchEvent(event);
    }
}"""
PASTE = DROP.replace('"dragover", "drop"', '"paste"').replace("DragEvent", "ClipboardEvent")
PASTE = PASTE.replace("dataTransfer:", "clipboardData:")

expect.set_options(timeout=LIMIT)


def field(page: Page, label: str) -> Locator:
    return page.get_by_label(label, exact=True)


def fill(page: Page, **fields: str) -> None:
    for label, value in fields.items():
        field(page, label.replace("_", " ")).fill(value)


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def unfold(page: Page, title: str) -> None:
    page.locator("summary", has_text=title).click()


def shown(page: Page) -> Locator:
    return page.get_by_role("article", name="The picture shown")


def said(page: Page, name: str) -> Locator:
    """What the page says of the picture shown."""
    return shown(page).locator("dl div", has=page.get_by_text(name, exact=True)).locator("dd")


def thumbnails(page: Page) -> Locator:
    return page.get_by_role("region", name="Pictures").get_by_role("listitem")


def make(page: Page, seed: int = 7, **fields: str) -> None:
    fill(page, Prompt=QUICK["prompt"], Steps="4", Seed=str(seed), **fields)
    press(page, "Generate")
    expect(said(page, "Seed")).to_have_text(str(seed))


def picture(page: Page) -> bytes:
    """The file of the picture shown."""
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    return Path(download.value.path()).read_bytes()


def png(size: tuple[int, int] = (128, 128), colour: str = "white", **texts: str) -> bytes:
    file, info = BytesIO(), PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", size, colour).save(file, "png", pnginfo=info)
    return file.getvalue()


def drop(page: Page, data: bytes, how: str = DROP, kind: str = "image/png") -> None:
    page.evaluate(how, {"data": base64.b64encode(data).decode(), "type": kind})


def choose_image(page: Page, data: bytes, label: str = "Choose an image") -> None:
    file: Any = {"name": "in.png", "mimeType": "image/png", "buffer": data}
    page.get_by_label(label).set_input_files(file)


def requests_of(page: Page) -> list[dict[str, Any]]:
    """The bodies of what it asks the server to make from now on."""
    bodies: list[dict[str, Any]] = []
    page.on(
        "request",
        lambda one: (
            bodies.append(json.loads(one.post_data or ""))
            if one.url.endswith("/generate_stream")
            else None
        ),
    )
    return bodies


def until_idle(server: Server) -> None:
    give_up = time.monotonic() + 30
    while "sdbento_queue_depth 0.0" not in server.client.get("/metrics").text:
        assert time.monotonic() < give_up
        time.sleep(0.1)
