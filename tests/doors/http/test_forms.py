"""Forms are read as JSON: text, numbers, objects and files."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from sdbento.doors.http.forms import MAX_PARTS, form_as_json, is_form
from sdbento.errors import MalformedRequest


async def read(**parts: Any) -> Any:
    files = {
        name: part if isinstance(part, tuple) else (None, part) for name, part in parts.items()
    }
    request = httpx.Request("POST", "http://test", files=files)
    headers = Headers(dict(request.headers))
    assert is_form(headers)
    return json.loads(await form_as_json(headers, request.read()))


async def test_files_become_base64_and_text_is_read_as_its_field_demands() -> None:
    assert await read(
        prompt="a red circle",
        negative_prompt='"quoted, as BentoML\'s client does"',
        scheduler="null",
        seed="7",
        lora='{"model_id": "x"}',
        image=("in.png", b"bytes"),
    ) == {
        "prompt": "a red circle",
        "negative_prompt": "quoted, as BentoML's client does",
        "scheduler": None,
        "seed": 7,
        "lora": {"model_id": "x"},
        "image": b64encode(b"bytes").decode(),
    }


@pytest.mark.parametrize("text", ["7", "[1]", "true", '{"a": 1}'])
async def test_a_prompt_that_looks_like_json_is_still_a_text(text: str) -> None:
    assert (await read(prompt=text))["prompt"] == text


async def test_too_many_parts_and_no_form_at_all_are_refused() -> None:
    with pytest.raises(MalformedRequest, match="the form cannot be read"):
        await read(**{f"part{i}": "x" for i in range(MAX_PARTS + 1)})
    for kind in ("multipart/form-data", "multipart/form-data; boundary=\u00e4"):
        with pytest.raises(MalformedRequest, match="the form cannot be read"):
            await form_as_json(Headers({"content-type": kind}), b"x")
