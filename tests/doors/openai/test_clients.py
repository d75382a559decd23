"""OpenAI's own SDK, unchanged, and the recorded requests of other clients, on a real server."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from tests.support.server import QUICK, Server, alike, assert_error, generated, pixels

PROMPT = QUICK["prompt"]
FEW = {"steps": 4, "seed": 7}  # what QUICK says, in the words of other servers


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


def with_hole(image: Image.Image) -> Image.Image:
    """Transparent in the left half."""
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, image.width // 2, image.height))
    return image


def white_left(size: tuple[int, int]) -> str:
    """The same mask as /generate takes it."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return b64encode(png(mask)).decode()


def decoded(data: Any) -> list[NDArray[np.int16]]:
    return [pixels(b64decode(image.b64_json)) for image in data or []]


def assert_same(some: list[NDArray[np.int16]], others: list[NDArray[np.int16]]) -> None:
    assert len(some) == len(others)
    assert all(map(alike, some, others))


# The SDK


def test_generate(server: Server, sdk: OpenAI) -> None:
    answer = sdk.images.generate(
        prompt=PROMPT, model="gpt-image-1", n=2, size="64x72", quality="high", extra_body=FEW
    )
    assert answer.size == "64x72"
    assert answer.quality == "high"
    assert answer.usage is not None and answer.usage.total_tokens == 7
    expected = generated(server, **QUICK, num_images=2, width=64, height=72)
    assert_same(decoded(answer.data), expected)


def test_generate_with_urls(server: Server, sdk: OpenAI) -> None:
    answer = sdk.images.generate(
        prompt=PROMPT, n=2, size="auto", response_format="url", output_format="webp",
        output_compression=40, extra_body=FEW,
    )  # fmt: skip
    assert answer.data is not None
    for image in answer.data:
        assert image.b64_json is None and image.url is not None and image.url.endswith(".webp")
        file = httpx.get(image.url, trust_env=False)
        assert Image.open(BytesIO(file.content)).format == "WEBP"
    expected = generated(server, **QUICK, num_images=2, output_format="webp", output_compression=40)
    urls = [image.url for image in answer.data if image.url is not None]
    assert_same([pixels(httpx.get(url, trust_env=False).content) for url in urls], expected)


def test_stream_of_generate(server: Server, sdk: OpenAI) -> None:
    *partial, completed = sdk.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, output_format="jpeg", extra_body=FEW
    )
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    for index, event in enumerate(partial):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == index
        preview = Image.open(BytesIO(b64decode(event.b64_json)))
        assert (preview.format, f"{preview.width}x{preview.height}") == ("JPEG", completed.size)
    assert completed.type == "image_generation.completed"
    assert completed.usage.total_tokens == 7
    assert_same(decoded([completed]), generated(server, **QUICK, output_format="jpeg"))


@pytest.mark.parametrize("field", ["image", "list"])
def test_edit(server: Server, sdk: OpenAI, field: str) -> None:
    image = png(picture())
    files: Any = image if field == "image" else [image, png(picture((32, 32)))]
    answer = sdk.images.edit(image=files, prompt=PROMPT, size="72x64", extra_body=FEW)
    source = b64encode(image).decode()
    expected = generated(server, **QUICK, image=source, width=72, height=64)
    assert_same(decoded(answer.data), expected)


def test_edit_with_a_mask_of_another_size(server: Server, sdk: OpenAI) -> None:
    image = png(picture())
    answer = sdk.images.edit(
        image=("photo.png", image), mask=png(with_hole(picture((32, 32)))), prompt=PROMPT,
        n=2, extra_body={**FEW, "lora": [{"model_id": "outline", "weight": 0.5}]},
    )  # fmt: skip
    expected = generated(
        server,
        **QUICK,
        image=b64encode(image).decode(),
        mask_image=white_left((32, 32)),
        num_images=2,
        lora={"model_id": "outline", "weight": 0.5},
    )
    assert_same(decoded(answer.data), expected)


def test_edit_of_an_image_with_holes_repaints_them(server: Server, sdk: OpenAI) -> None:
    image = png(with_hole(picture()))
    answer = sdk.images.edit(image=image, prompt=PROMPT, extra_body=FEW)
    source = b64encode(image).decode()
    expected = generated(server, **QUICK, image=source, mask_image=white_left((64, 64)))
    assert_same(decoded(answer.data), expected)


def test_stream_of_edit(server: Server, sdk: OpenAI) -> None:
    image = png(picture((100, 60)))
    *partial, completed = sdk.images.edit(
        image=image, prompt=PROMPT, input_fidelity="high", stream=True, partial_images=1,
        extra_body={"steps": 8, "seed": 7},
    )  # fmt: skip
    assert [event.type for event in partial] == ["image_edit.partial_image"]
    assert completed.type == "image_edit.completed"
    assert completed.size == partial[0].size == "96x64"
    source = b64encode(image).decode()
    request = {**QUICK, "num_inference_steps": 8, "image": source, "strength": 0.5}
    assert_same(decoded([completed]), generated(server, **request))


def test_previews_have_the_size_of_the_image_to_come(server: Server, sdk: OpenAI) -> None:
    enlarged = {"hires": {"scale": 1.5}, **FEW}
    partial, completed = sdk.images.generate(
        prompt=PROMPT, size="64x72", stream=True, partial_images=1, extra_body=enlarged
    )
    assert partial.size == completed.size == "96x104"
    one, last = sdk.images.edit(
        image=png(with_hole(picture((100, 60)))), prompt=PROMPT, size="64x64", stream=True,
        partial_images=1, extra_body={"padding_mask_crop": 4, **FEW},
    )  # fmt: skip
    assert one.size == last.size == "100x60"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_create_variation(server: Server, sdk: OpenAI) -> None:
    image = png(picture())
    answer = sdk.images.create_variation(
        image=image, n=2, response_format="b64_json", extra_body=FEW
    )
    source = b64encode(image).decode()
    expected = generated(
        server, **{**QUICK, "prompt": ""}, image=source, strength=0.7, num_images=2
    )
    assert_same(decoded(answer.data), expected)


def test_models(sdk: OpenAI) -> None:
    ids = [model.id for model in sdk.models.list()]
    assert ids[0] == "shapes"
    assert sdk.models.retrieve("stabilityai/sdxl-turbo").owned_by == "sdbento"


def test_errors_are_the_sdks_own(sdk: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.images.generate(prompt=PROMPT, size="huge")
    assert refused.value.param == "size"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        sdk.images.generate(prompt=PROMPT, stream=True, extra_body={"scheduler": "none"})
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.models.retrieve("gpt-image-1")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError) as late:
        sdk.images.generate(prompt=PROMPT, extra_body={"steps": 150, "timeout": 0.05})
    assert late.value.status_code == 504


async def test_the_asynchronous_sdk(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as sdk:
        answer = await sdk.images.generate(prompt=PROMPT, extra_body=FEW)
        stream = await sdk.images.generate(prompt=PROMPT, stream=True, extra_body=FEW)
        completed = [event async for event in stream]
        models = [model.id async for model in sdk.models.list()]
    assert models[0] == "shapes"
    expected = generated(server, **QUICK)
    assert_same(decoded(answer.data), expected)
    assert_same(decoded(completed), expected)


def test_a_stream_whose_client_leaves_is_stopped(server: Server) -> None:
    body = {"prompt": PROMPT, "n": 16, "steps": 150, "stream": True}
    with pytest.raises(httpx.ReadTimeout):
        with httpx.stream(
            "POST", f"{server.url}/v1/images/generations", json=body, timeout=0.7, trust_env=False
        ) as response:
            response.read()
    generated(server, **QUICK, timeout=60)  # 2400 steps would take longer


# Recorded requests of other clients, whose sizes are smaller here: they take long on a CPU

OPEN_WEBUI = {"model": "dall-e-2", "prompt": PROMPT, "n": 1, "size": "128x128"}
LIBRECHAT = {"model": "gpt-image-1", "prompt": PROMPT, "n": 1, "background": "auto"}
LIBRECHAT |= {"output_format": "png", "quality": "auto", "size": "auto"}
DALLE3 = {"model": "dall-e-3", "quality": "standard", "style": "vivid", "size": "96x128"}
LOBECHAT = {"model": "flux", "n": 1, "prompt": PROMPT, "width": 128, "height": 64, "cfg": 3}
LITELLM = {"model": "shapes", "prompt": PROMPT, "n": 1, "moderation": "auto", "user": "me"}
CLIENTS = {
    "Open WebUI": (OPEN_WEBUI | {"response_format": "b64_json"} | FEW, "b64_json", "128x128"),
    "Open WebUI, gpt-image": (OPEN_WEBUI | FEW | {"model": "gpt-image-1"}, "b64_json", "128x128"),
    "LibreChat": (LIBRECHAT | FEW, "b64_json", "128x128"),
    "LibreChat, DALLE3": (DALLE3 | FEW | {"prompt": PROMPT, "n": 1}, "url", "96x128"),
    "LobeChat": (LOBECHAT | FEW, "b64_json", "128x64"),
    "AnythingLLM": (OPEN_WEBUI | FEW | {"model": "x", "size": "96x96"}, "b64_json", "96x96"),
    "n8n": (OPEN_WEBUI | FEW | {"response_format": "url", "style": "natural"}, "url", "128x128"),
    "Nextcloud": (OPEN_WEBUI | FEW | {"n": 12, "size": "64x64"}, "url", "64x64"),
    "LiteLLM": (LITELLM | FEW | {"style": None}, "b64_json", "128x128"),
    "RisuAI": ({"prompt": PROMPT, "response_format": "b64_json", "size": "64x64", **FEW},
               "b64_json", "64x64"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLIENTS)
def test_requests_to_generate(server: Server, name: str) -> None:
    body, kind, size = CLIENTS[name]
    headers = {"Authorization": "Bearer sk-anything"}
    response = server.client.post("/v1/images/generations", json=body, headers=headers)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert len(answer["data"]) == body.get("n", 1)
    for image in answer["data"]:
        assert set(image) == {kind}
        data = contents(image)
        assert "{}x{}".format(*Image.open(BytesIO(data)).size) == size


def contents(image: dict[str, str]) -> bytes:
    if "b64_json" in image:
        return b64decode(image["b64_json"])
    return httpx.get(image["url"], trust_env=False).content


EDITORS: dict[str, tuple[dict[str, str], list[str]]] = {
    "Open WebUI": (
        {"model": "gpt-image-1", "prompt": PROMPT, "n": "1", "background": "auto"},
        ["image[]", "image[]"],
    ),
    "LibreChat": ({"model": "gpt-image-1", "quality": "auto", "size": "auto"}, ["image[]"]),
    "LobeChat": ({"model": "gpt-image-1", "input_fidelity": "high"}, ["image"]),
    "AnythingLLM": ({"model": "x", "size": "64x64", "n": "1"}, ["image", "image"]),
    "n8n": (
        {"model": "dall-e-2", "user": "me", "output_compression": "80", "output_format": "jpeg"},
        ["image"],
    ),
}


@pytest.mark.parametrize("name", EDITORS)
def test_requests_to_edit(server: Server, name: str) -> None:
    fields, names = EDITORS[name]
    files = [(part, (f"reference-{i}.png", png(picture()))) for i, part in enumerate(names)]
    data = {"prompt": PROMPT, "steps": "4"} | fields
    response = server.client.post("/v1/images/edits", data=data, files=files)
    assert response.status_code == 200, response.text
    assert response.json()["size"] == "64x64"


def test_sillytavern_pings_with_options(server: Server) -> None:
    assert server.client.options("/v1/images/generations").is_success
    assert server.client.get("/v1/models").json()["data"][0]["id"] == "shapes"


def test_frameworks_errors_have_the_shape_too(server: Server) -> None:
    for response, status in [
        (server.client.get("/v1/nothing"), 404),
        (server.client.get("/v1/images/edits"), 405),
        (server.client.post("/v1/images/generations", content=b"{"), 400),
    ]:
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert_error(server.client.get("/nothing"), 404)
