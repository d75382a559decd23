"""The page at / in a real Chromium, used as a person uses it: by the names of what is on it."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from tests.support.browser import open_page, profile
from tests.support.page import (
    LONG,
    PASTE,
    choose_image,
    drop,
    field,
    fill,
    make,
    picture,
    png,
    press,
    requests_of,
    said,
    shown,
    thumbnails,
    unfold,
    until_idle,
)
from tests.support.server import QUICK, Server, alike, pixels

KEPT_MASK = """() => new Promise((answer) => {
    indexedDB.open("sdbento.form").onsuccess = ({target: {result}}) => {
        const kept = result.transaction("images").objectStore("images").get("images");
        kept.onsuccess = () => answer(Boolean(kept.result?.mask_image));
    };
})"""
INFOTEXT = """a small green star (on white:1.2)
Negative prompt: blurry, dark
Steps: 12, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 99, Size: 128x64, \
Model: shapes, Clip skip: 1, Version: v1.10.0"""


# Making pictures


def test_it_makes_the_picture_that_the_api_makes(page: Page, server: Server) -> None:
    fill(page, Negative_prompt="blurry")
    make(page, Guidance="3")
    expect(said(page, "Model")).to_have_text("shapes")
    expect(said(page, "Steps")).to_have_text("4")
    asked = {**QUICK, "negative_prompt": "blurry", "guidance_scale": 3}
    assert alike(pixels(picture(page)), pixels(server.client.post("/txt2img", json=asked).content))


def test_it_shows_the_progress_and_cancelling_stops_the_work(page: Page, server: Server) -> None:
    fill(page, Prompt="a white ring", **LONG)
    press(page, "Generate")
    bar = page.get_by_role("progressbar")
    expect(page.get_by_text("of 150, about")).to_be_visible()
    expect(page.get_by_alt_text("Preview of image 1", exact=True)).to_be_visible()
    assert 0 <= int(bar.get_attribute("aria-valuenow") or "") < 100
    assert "%" in page.title()
    press(page, "Cancel")
    expect(bar).to_have_count(0)
    expect(page.get_by_role("status")).to_contain_text("Cancelled")
    assert page.title() == "sdbento"
    until_idle(server)


def test_several_generations_run_at_once(page: Page, server: Server) -> None:
    fill(page, Prompt="a white ring", **LONG)
    press(page, "Generate")
    expect(page.get_by_role("progressbar")).to_have_count(1)
    make(page, Images="2")  # in the same batch: it does not wait for the other
    expect(page.get_by_role("progressbar")).to_have_count(1)
    expect(thumbnails(page)).to_have_count(2)
    press(page, "Cancel")
    until_idle(server)


def test_what_is_being_made_stays_in_view(browser: Browser, server: Server) -> None:
    with profile(browser, server.url, viewport={"width": 1280, "height": 850}) as context:
        page = open_page(context)
        make(page)  # the browser keeps it in view when something comes above it
        fill(page, Prompt="a white ring", **LONG)
        bars = page.get_by_role("progressbar")
        for count in (1, 2, 3):
            press(page, "Generate")
            expect(bars).to_have_count(count)
            expect(bars.first).to_be_in_viewport()
        for left in (2, 1, 0):
            page.keyboard.press("Escape")
            expect(bars).to_have_count(left)
        until_idle(server)


def test_the_keyboard_is_enough(page: Page, server: Server) -> None:
    field(page, "Prompt").focus()
    page.keyboard.type("a white ring")
    page.keyboard.press("Tab")
    expect(field(page, "Negative prompt")).to_be_focused()
    fill(page, **LONG)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("progressbar")).to_have_count(0)
    until_idle(server)
    make(page, seed=1, Images="1")
    make(page, seed=2)
    page.get_by_role("button", name=f"{QUICK['prompt']}, #2").focus()
    page.keyboard.press("ArrowRight")
    expect(said(page, "Seed")).to_have_text("1")
    expect(page.get_by_role("button", name=f"{QUICK['prompt']}, #1")).to_be_focused()
    page.keyboard.press("Delete")
    expect(said(page, "Seed")).to_have_text("2")
    press(page, "Undo")
    expect(said(page, "Seed")).to_have_text("1")


# What goes wrong


def test_an_error_stands_beside_its_field_in_the_servers_own_words(
    page: Page, server: Server
) -> None:
    fill(page, Prompt="a white ring", Steps="151")
    press(page, "Generate")
    error = server.client.post("/generate", json={"prompt": "", "num_inference_steps": 151})
    steps = field(page, "Steps")
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_have_accessible_description(error.json()["error"]["message"])
    expect(steps).to_be_focused()
    steps.fill("4")
    expect(steps).not_to_have_attribute("aria-invalid", "true")


def test_an_error_of_a_folded_field_unfolds_it(page: Page) -> None:
    unfold(page, "LoRAs")
    press(page, "Add a LoRA")
    field(page, "LoRA 1").fill("nobody")
    unfold(page, "LoRAs")
    press(page, "Generate")
    expect(page.get_by_text("'nobody'")).to_be_visible()
    expect(field(page, "LoRA 1")).to_be_focused()


def test_a_full_queue_says_when_to_try_again(page: Page) -> None:
    def refuse(route: Route) -> None:
        error = {"type": "queue_full", "message": "100 requests wait", "param": None}
        route.fulfill(status=429, headers={"Retry-After": "30"}, json={"error": error})

    page.route("**/generate_stream", refuse)
    press(page, "Generate")
    expect(page.get_by_role("alert")).to_have_text("100 requests wait")
    expect(page.get_by_text("Worth trying again in")).to_be_visible()
    page.unroute("**/generate_stream")
    press(page, "Try again")
    expect(shown(page)).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_server_that_is_gone_is_said_to_be(page: Page) -> None:
    page.route("**/generate_stream", lambda route: route.abort())
    press(page, "Generate")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")


# The gallery


def test_the_gallery_survives_a_reload(page: Page) -> None:
    make(page)
    made = picture(page)
    page.reload()
    expect(said(page, "Seed")).to_have_text("7")
    assert picture(page) == made
    press(page, "Reuse last")
    expect(field(page, "Seed")).to_have_value("7")
    expect(field(page, "Prompt")).to_have_value(QUICK["prompt"])


def test_two_tabs_make_pictures_and_show_those_of_both(context: BrowserContext) -> None:
    tabs = [open_page(context), open_page(context)]
    for seed, tab in enumerate(tabs):
        fill(tab, Prompt="a white ring", Steps="4", Seed=str(seed))
        press(tab, "Generate")
    for tab in tabs:
        expect(thumbnails(tab)).to_have_count(2)


def copied(page: Page, name: str) -> str:
    page.locator("summary", has_text="Copy as").click()
    press(page, name)
    expect(page.get_by_role("status")).to_contain_text(f"Copied as {name}")
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def run(text: str, language: str) -> bytes:
    """The picture that what was copied makes, in the current folder."""
    names: dict[str, Any] = {}
    if language == "curl":
        subprocess.run(text, shell=True, check=True)
    else:
        exec(compile(text, language, "exec"), names)
        names["client"].close()
    file = Path("picture.png")
    data = file.read_bytes()
    file.unlink()
    return data


def test_what_is_copied_makes_the_same_picture(
    page: Page, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(page, Negative_prompt="<lora:outline:0.5> it's blurry; type=x")
    made = pixels(picture(page))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    for name in ("curl", "Python", "OpenAI"):
        assert alike(made, pixels(run(copied(page, name), name))), name
    job = server.client.post("/runsync", content=copied(page, "RunPod JSON")).json()
    assert alike(pixels(base64.b64decode(job["output"][0])), made)


def test_what_is_copied_of_a_request_with_a_mask_takes_files_beside_it(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = png(colour="yellow")
    drop(page, image)
    page.get_by_role("radio", name="Repaint a part").check()
    paint(page, 0.5)
    bodies = requests_of(page)
    make(page)
    made = pixels(picture(page))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Path("image.png").write_bytes(image)
    Path("mask.png").write_bytes(as_bytes(bodies[0]["mask_image"]))
    for name in ("curl", "Python", "OpenAI"):
        assert alike(made, pixels(run(copied(page, name), name))), name


def test_a_page_that_came_by_plain_http_can_copy(context: BrowserContext) -> None:
    context.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page = open_page(context)
    make(page)
    page.locator("summary", has_text="Copy as").click()
    press(page, "RunPod JSON")
    expect(page.get_by_role("status")).to_contain_text("Copied as RunPod JSON")
    field(page, "Prompt").fill("")
    page.keyboard.press("Control+V")
    expect(field(page, "Prompt")).to_have_value(
        re.compile('"input".+"num_inference_steps": 4', re.S)
    )


def test_again_draws_another_seed_and_reuse_takes_the_same(page: Page) -> None:
    make(page, Guidance="2")
    bodies = requests_of(page)
    press(page, "Again")
    expect(said(page, "Seed")).not_to_have_text("7")
    press(page, "Reset")
    expect(field(page, "Guidance")).to_have_value("")
    page.get_by_role("button", name=f"{QUICK['prompt']}, #7", exact=True).click()
    press(page, "Reuse settings")
    expect(field(page, "Guidance")).to_have_value("2")
    expect(field(page, "Seed")).to_have_value("7")
    [again] = bodies
    assert "seed" not in again and again["guidance_scale"] == 2


def test_a_seed_of_63_bits_is_not_rounded(page: Page, server: Server) -> None:
    seed = 2**63 - 1
    make(page, seed=seed)
    asked = {**QUICK, "seed": seed}
    assert alike(pixels(picture(page)), pixels(server.client.post("/txt2img", json=asked).content))
    press(page, "Reset")
    press(page, "Reuse last")
    expect(field(page, "Seed")).to_have_value(str(seed))


# Images that go in


def test_only_what_was_painted_over_is_repainted(page: Page) -> None:
    bodies = requests_of(page)
    unfold(page, "Start from an image")
    choose_image(page, png(colour="yellow"))
    page.get_by_role("radio", name="Repaint a part").check()
    make_mask(page)
    field(page, "Blur of the mask's edge").fill("2")
    make(page)
    mask = Image.open(BytesIO(as_bytes(bodies[0]["mask_image"])))
    assert mask.size == (128, 128)
    painted = np.asarray(mask.convert("L"))
    assert painted[64, 40] == painted[64, 90] == 255  # between the ends of the stroke
    assert painted[64, 10] == painted[20, 64] == painted[100, 64] == 0
    made = pixels(picture(page))
    assert np.abs(made[:32] - [255, 255, 0]).max() <= 1  # what was not painted over is as it was
    assert np.abs(made[60:68, 45:85] - [255, 255, 0]).mean() > 30


def test_a_mask_is_painted_by_keyboard(page: Page) -> None:
    bodies = requests_of(page)
    drop(page, png(colour="yellow"))
    page.get_by_role("radio", name="Repaint a part").check()
    canvas = page.get_by_role("application", name="Paint over what is to be repainted")
    expect(canvas).to_have_accessible_description(re.compile("Space paints"))
    canvas.focus()
    page.keyboard.press("[")  # from 16 pixels to 13
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Space")
    expect(page.get_by_text("Painted at 51, 64", exact=True)).to_be_attached()
    page.keyboard.down("Space")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowUp")
    page.keyboard.up("Space")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    page.keyboard.press("Control+z")
    make(page)
    mask = np.asarray(Image.open(BytesIO(as_bytes(bodies[0]["mask_image"]))).convert("L"))
    rows, columns = np.nonzero(mask > 128)
    assert 44 <= columns.min() < columns.max() <= 58  # a line upwards from (51, 64)
    assert 18 <= rows.min() < rows.max() <= 71


def test_an_image_and_its_mask_survive_a_reload(page: Page) -> None:
    drop(page, png(colour="yellow"))
    page.get_by_role("radio", name="Repaint a part").check()
    paint(page, 0.5)
    while not page.evaluate(KEPT_MASK):  # it is written in a moment
        page.wait_for_timeout(50)
    page.reload()
    expect(page.get_by_role("application", name="Paint over")).to_be_visible()
    bodies = requests_of(page)
    make(page)
    assert as_bytes(bodies[0]["image"]) == png(colour="yellow")
    assert np.asarray(Image.open(BytesIO(as_bytes(bodies[0]["mask_image"]))).convert("L"))[64, 64]


def as_bytes(data_uri: str) -> bytes:
    return base64.b64decode(data_uri.partition(",")[2])


def make_mask(page: Page) -> None:
    """A stroke from left to right, after another one that is undone."""
    paint(page, 20 / 128)
    press(page, "Undo")
    paint(page, 0.5)


def paint(page: Page, height: float) -> None:
    canvas = page.get_by_role("application", name="Paint over")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    y = box["y"] + height * box["height"]
    drag(page, box["x"] + 0.3 * box["width"], y, box["x"] + 0.75 * box["width"])


def drag(page: Page, x: float, y: float, to: float) -> None:
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(to, y, steps=4)
    page.mouse.up()


def test_what_is_not_painted_over_stays_unless_the_blur_is_0(page: Page) -> None:
    bodies = requests_of(page)
    drop(page, png(colour="yellow"))
    page.get_by_role("radio", name="Repaint a part").check()
    paint(page, 0.5)
    make(page)
    made = picture(page)
    assert np.abs(pixels(made)[:32] - [255, 255, 0]).max() <= 1
    field(page, "Blur of the mask's edge").fill("0")
    make(page, seed=8)
    assert [body["mask_blur"] for body in bodies] == [4, 0]


def test_without_a_mask_nothing_is_repainted(page: Page) -> None:
    bodies = requests_of(page)
    drop(page, png(), PASTE)
    page.get_by_role("radio", name="Repaint a part").check()
    press(page, "Generate")
    expect(page.get_by_text("Paint over what is to be repainted.")).to_have_count(2)
    assert bodies == []


def test_an_image_is_extended_by_dragging_its_edge(page: Page) -> None:
    drop(page, png())
    page.get_by_role("radio", name="Extend it").check()
    field(page, "Top").fill("16")
    edge = page.locator(".edge.right")
    edge.scroll_into_view_if_needed()
    box = edge.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    drag(page, x, y, x + 100)
    right = int(field(page, "Right").input_value())
    assert right > 0 and right % 8 == 0
    make(page)
    expect(said(page, "Size")).to_have_text(f"{128 + right} × 144")


def test_an_image_is_extended_by_keyboard(page: Page) -> None:
    drop(page, png())
    page.get_by_role("radio", name="Extend it").check()
    edge = page.get_by_role("slider", name="The left edge")
    edge.press("Shift+ArrowLeft")
    edge.press("ArrowRight")
    expect(edge).to_have_attribute("aria-valuenow", "56")
    expect(field(page, "Left")).to_have_value("56")


def test_a_picture_becomes_the_input_of_the_next(page: Page) -> None:
    make(page)
    bodies = requests_of(page)
    press(page, "As input")
    expect(page.get_by_alt_text("The image to start from")).to_be_visible()
    field(page, "Strength").fill("0.4")
    make(page, seed=8)
    assert bodies[0]["strength"] == 0.4 and bodies[0]["image"].startswith("data:image/png;base64,")


def test_a_dropped_picture_of_ours_restores_its_settings(page: Page, server: Server) -> None:
    asked = {**QUICK, "negative_prompt": "blurry", "scheduler": "Euler a", "width": 64}
    asked |= {"lora": [{"model_id": "outline", "weight": 0.5}], "guidance_rescale": 0.25}
    drop(page, server.client.post("/txt2img", json=asked).content)
    expect(field(page, "Prompt")).to_have_value(QUICK["prompt"])
    expect(field(page, "Negative prompt")).to_have_value("blurry")
    expect(field(page, "Seed")).to_have_value("7")
    expect(field(page, "LoRA 1")).to_have_value("outline")
    bodies = requests_of(page)
    press(page, "Generate")
    expect(shown(page)).to_be_visible()
    sent = {name: value for name, value in bodies[0].items() if name in asked}
    assert sent == asked


def test_a_dropped_picture_of_the_web_ui_restores_its_settings(page: Page) -> None:
    drop(page, png(parameters=INFOTEXT))
    expect(field(page, "Prompt")).to_have_value("a small green star (on white:1.2)")
    for label, value in {
        "Negative prompt": "blurry, dark", "Steps": "12", "Guidance": "5.5", "Seed": "99",
        "Width": "128", "Height": "64", "Sampler": "DPM++ 2M", "Noise schedule": "karras",
    }.items():  # fmt: skip
        expect(field(page, label)).to_have_value(value)
    press(page, "Undo")
    expect(field(page, "Prompt")).to_have_value("")


def test_what_this_server_does_not_have_is_named_when_settings_are_restored(page: Page) -> None:
    old = "a star\nSteps: 9, Sampler: DPM++ 2M SDE Karras, CFG scale: 6, Seed: 1, Model: dreams"
    drop(page, png(parameters=old))
    expect(field(page, "Sampler")).to_have_value("DPM++ 2M SDE")
    expect(field(page, "Noise schedule")).to_have_value("karras")
    status = page.get_by_role("status")
    expect(status).to_contain_text("Settings restored, except the model dreams.")
    drop(page, png(parameters=old.replace("DPM++ 2M SDE Karras", "Restart")))
    expect(status).to_contain_text("except the sampler Restart and the model dreams.")
    expect(field(page, "Sampler")).to_have_value("")


# LoRAs, ControlNets, second passes


def test_loras_controlnets_and_a_second_pass_are_sent(page: Page) -> None:
    bodies = requests_of(page)
    unfold(page, "LoRAs")
    press(page, "Add a LoRA")
    field(page, "LoRA 1").fill("checker")
    field(page, "Weight of LoRA 1").fill("0.75")
    unfold(page, "ControlNet")
    press(page, "Add a ControlNet")
    square = Image.new("RGB", (128, 128), "white")
    square.paste((0, 0, 0), (32, 32, 96, 96))
    file = BytesIO()
    square.save(file, "png")
    choose_image(page, file.getvalue(), "Choose the image of ControlNet 1")
    expect(page.get_by_alt_text("Its control image: canny")).to_be_visible()
    unfold(page, "Second pass")
    page.get_by_label("Enlarge, and denoise again").check()
    fill(page, Times_as_large="1.5")
    make(page)
    expect(said(page, "Size")).to_have_text("192 × 192")
    expect(said(page, "LoRAs")).to_have_text("checker 0.75")
    [body] = bodies
    assert body["lora"] == [{"model_id": "checker", "weight": 0.75}]
    assert body["controlnet"][0]["type"] == "canny" and body["controlnet"][0]["preprocess"]
    assert body["hires"] == {"scale": 1.5, "strength": 0.6, "upscaler": "lanczos"}


# Where it is looked at


def test_it_fits_a_phone(browser: Browser, server: Server) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with profile(browser, server.url, **phone) as context:
        page = open_page(context)
        for summary in page.locator("form summary").all():
            summary.tap()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        fill(page, Prompt="a white ring", Steps="4")
        page.get_by_role("button", name="Generate").tap()
        expect(shown(page).get_by_role("img")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize(
    ("model", "example", "loras"),
    [
        ("shapes", "a large red circle on a blue background", ["outline", "checker"]),
        ("emoji", "a red apple on a blue background", ["emoji-outline", "emoji-pixel-art"]),
    ],
)
def test_an_embedded_model_says_what_it_draws_and_offers_its_own_loras(
    browser: Browser, server: Server, model: str, example: str, loras: list[str]
) -> None:
    with profile(browser, server.url) as context:
        page = open_page(context)
        page.get_by_label("Model", exact=True).select_option(model)
        page.get_by_text("LoRAs", exact=True).click()
        press(page, "Add a LoRA")
        expect(page.get_by_label("LoRA 1", exact=True)).to_have_value(loras[0])
        offered = page.locator("#known-loras option").all()
        assert [option.get_attribute("value") for option in offered] == loras
        press(page, f"Make “{example}”")
        expect(shown(page).get_by_role("img", name=example)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_keeps_people_out(
    browser: Browser, server: Server, scheme: Any
) -> None:
    from axe_playwright_python.base import AXE_SCRIPT

    with profile(browser, server.url, color_scheme=scheme, reduced_motion="reduce") as context:
        page = open_page(context)
        for summary in page.locator("form summary").all():
            summary.click()
        press(page, "Add a LoRA")
        press(page, "Add a ControlNet")
        drop(page, png())
        expect(page.get_by_alt_text("The image to start from")).to_be_visible()
        fill(page, Prompt="a white ring", Steps="4", Images="2")
        press(page, "Generate")
        expect(shown(page)).to_be_visible()
        fill(page, Steps="151")
        press(page, "Generate")
        expect(field(page, "Steps")).to_have_attribute("aria-invalid", "true")
        page.evaluate(AXE_SCRIPT)
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        assert not grave, json.dumps([(one["id"], one["nodes"]) for one in grave], indent=1)


def test_the_colours_can_be_chosen(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    press(page, "Colours: auto")
    assert page.evaluate(ground) == light
    press(page, "Colours: light")
    assert page.evaluate(ground) != light
    page.reload()
    expect(page.get_by_role("button", name="Colours: dark")).to_be_visible()
    assert page.evaluate(ground) != light


def test_it_works_below_a_prefix(context: BrowserContext, server: Server) -> None:
    def below(route: Route) -> None:
        route.continue_(url=route.request.url.replace("/some/prefix/", "/"))

    context.route("**/some/prefix/**", below)
    outside: list[str] = []
    context.on(
        "request", lambda one: None if "/some/prefix/" in one.url else outside.append(one.url)
    )
    page = open_page(context, "/some/prefix/")
    make(page)
    assert [url for url in outside if not url.startswith(("blob:", "data:"))] == []


def test_a_page_of_files_is_all_it_is(server: Server) -> None:
    answer = httpx.get(server.url, follow_redirects=False)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
