"""Bodies of edits: forms as OpenAI's SDKs and others write them, and JSON."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from sdbento.doors.http.routing import _JSONRequest
from sdbento.doors.openai.body import ImageBody, VariationBody
from sdbento.doors.openai.parts import Parts, describe, read
from sdbento.errors import InvalidParameter, MalformedRequest, SDBentoError

PNG = ("a.png", b"\x89PNG", "image/png")
ENCODED = b64encode(PNG[1]).decode()


async def read_sent(**sent: Any) -> Parts:
    request = httpx.Request("POST", "http://test", **sent)
    headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
    body = request.read()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return await read(_JSONRequest({"type": "http", "headers": headers}, receive))


@pytest.mark.parametrize(
    "names", [["image"], ["image[]"], ["image", "image"], ["image[]", "image[]"], ["image[0]"]]
)
async def test_images_come_under_several_names(names: list[str]) -> None:
    parts = await read_sent(files=[(name, PNG) for name in names], data={"prompt": "x"})
    assert parts.images == [ENCODED] * len(names)
    assert parts.fields == {"prompt": "x"}
    assert parts.mask is None


async def test_a_mask_and_the_text_of_fields() -> None:
    parts = await read_sent(files={"image": PNG, "mask": PNG}, data={"n": "2", "prompt": "1"})
    assert parts.mask == ENCODED
    assert parts.fields == {"n": "2", "prompt": "1"}


async def test_brackets_become_objects_and_lists() -> None:
    fields = {
        "refiner[switch_at]": "0.5",
        "original_size[]": ["64", "32"],
        "lora[][model_id]": ["outline", "checker"],
        "lora[][weight]": ["0.5"],
    }
    parts = await read_sent(files={"image": PNG}, data=fields)
    assert parts.fields["refiner"] == {"switch_at": 0.5}
    assert parts.fields["original_size"] == [64, 32]
    assert parts.fields["lora"] == [{"model_id": "outline"}, {"model_id": "checker", "weight": 0.5}]


@pytest.mark.parametrize(
    "fields",
    [{"a": "1", "a[]": "2"}, {"a[]": "1", "a[b]": "2"}, {"a[b]": "1", "a[][c]": "2"}],
)
async def test_brackets_that_contradict_each_other_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(MalformedRequest, match="brackets"):
        await read_sent(files={"image": PNG}, data=fields)


@pytest.mark.parametrize(
    "sent",
    [
        {"image": "abc"},
        {"image": ["abc"]},
        {"images": ["abc"]},
        {"images": [{"image_url": "abc"}]},
        {"images": [{"image_url": {"url": "abc"}}]},
        {"images": [{"b64_json": "abc"}], "image": None},
    ],
)
async def test_images_in_json(sent: dict[str, Any]) -> None:
    parts = await read_sent(json={**sent, "mask": {"image_url": "def"}, "prompt": "x"})
    assert parts == Parts({"prompt": "x"}, ["abc"], "def")


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"", MalformedRequest, "is not JSON"),
        (b"\xff", MalformedRequest, "is not JSON"),
        (b"[" * 60, MalformedRequest, "is not JSON"),
        (b"[]", MalformedRequest, "object"),
        (b"{}", InvalidParameter, "image is required"),
        (b'{"image": ""}', InvalidParameter, "image is required"),
        (b'{"images": []}', InvalidParameter, "image is required"),
        (b'{"image": 7}', InvalidParameter, "image must be"),
        (b'{"image": [[["x"]]]}', InvalidParameter, "image must be"),
        (b'{"images": [{"file_id": "file-1"}]}', InvalidParameter, "keeps none"),
        (b'{"image": "x", "mask": true}', InvalidParameter, "mask must be"),
    ],
)
async def test_bodies_without_an_image_say_what_is_wrong(
    body: bytes, kind: type[SDBentoError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        await read_sent(content=body)


@pytest.mark.parametrize("kind", [ImageBody, VariationBody])
def test_the_document_demands_an_image_under_either_name(kind: type[ImageBody]) -> None:
    content = describe(kind)["requestBody"]["content"]
    accepts = Draft202012Validator(content["application/json"]["schema"]).is_valid
    assert accepts({"prompt": "x", "image": "abc", "n": 2})
    assert accepts({"prompt": "x", "images": [{"image_url": "abc"}]})
    assert not accepts({"prompt": "x"})
    assert "image" in content["multipart/form-data"]["schema"]["required"]
