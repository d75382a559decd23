"""Forms are read as JSON: text, numbers, objects and files."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from sdbento.doors.http.forms import (
    MAX_PARTS,
    URLENCODED,
    body_as_json,
    form_as_json,
    is_form,
)
from sdbento.errors import MalformedRequest, TooLarge
from tests.support.damage import damaged


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


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 500 + "]" * 500, "[1" + ",1" * 1000 + "]"])
async def test_text_that_is_more_json_than_a_field_may_be_is_refused(text: str) -> None:
    with pytest.raises(TooLarge, match="lora may "):
        await read(lora=text)
    assert (await read(prompt=text))["prompt"] == text  # it is not read as JSON


async def test_an_urlencoded_form_of_escapes_alone_is_refused() -> None:
    with pytest.raises(TooLarge, match="at most 1000000 escaped"):
        await body("prompt=" + "%41" * 1_000_001, URLENCODED)


async def test_too_many_parts_and_no_form_at_all_are_refused() -> None:
    with pytest.raises(MalformedRequest, match="the form cannot be read"):
        await read(**{f"part{i}": "x" for i in range(MAX_PARTS + 1)})
    for kind in ("multipart/form-data", "multipart/form-data; boundary=\u00e4"):
        with pytest.raises(MalformedRequest, match="the form cannot be read"):
            await form_as_json(Headers({"content-type": kind}), b"x")


async def body(text: str, content_type: str) -> Any:
    headers = Headers({"content-type": content_type})
    return json.loads(await body_as_json(headers, text.encode()))


async def test_a_form_without_files_is_urlencoded_by_bentomls_client() -> None:
    fields = {"prompt": '"12"', "image": "https://a.example/b.png?c=d&e", "seed": "3", "lora": "[]"}
    read = await body(urlencode(fields), URLENCODED)
    assert read == fields | {"prompt": "12", "seed": 3, "lora": []}


async def test_json_may_be_called_urlencoded_as_curl_does() -> None:
    assert await body(' {"prompt": "a=b&c"}', URLENCODED) == {"prompt": "a=b&c"}


async def test_a_whole_request_may_be_the_prompt() -> None:
    whole = {"prompt": {"prompt": "a", "seed": 3}}
    assert await body(json.dumps(whole), "application/json") == whole["prompt"]
    form = urlencode({"prompt": json.dumps(whole["prompt"])})
    assert await body(form, URLENCODED) == whole["prompt"]
    assert await body(json.dumps(whole | {"seed": 4}), "") == whole | {"seed": 4}


@pytest.mark.parametrize("text", ["prompt", "a=b&c", "&".join(f"a{i}=1" for i in range(200))])
async def test_a_body_that_is_neither_json_nor_a_form_is_refused(text: str) -> None:
    with pytest.raises(MalformedRequest, match="neither JSON nor a form"):
        await body(text, URLENCODED)


async def test_a_body_that_only_begins_like_a_whole_request_is_left_to_the_parser() -> None:
    broken = b'{"prompt": {"prompt": "a"'
    assert await body_as_json(Headers({}), broken) == broken
    deep = b'{"prompt": {' + b'"a": {' * 100_000
    assert await body_as_json(Headers({}), deep) == deep


NAMES = st.sampled_from(["prompt", "seed", "image", "lora", "no such field"])


@given(st.dictionaries(NAMES, st.text(max_size=40) | st.binary(max_size=40), min_size=1))
async def test_what_a_form_holds_is_in_the_json(parts: dict[str, str | bytes]) -> None:
    files = {
        name: ("f", part) if isinstance(part, bytes) else (None, part)
        for name, part in parts.items()
    }
    answer = await read(**files)
    assert answer.keys() == parts.keys()
    for name, part in parts.items():
        if isinstance(part, bytes):
            assert answer[name] == b64encode(part).decode()
        elif name == "prompt":
            assert isinstance(answer[name], str | None)


FORM = httpx.Request("POST", "http://t", files={"prompt": (None, "x"), "image": ("f", b"1" * 9)})
FORM.read()
BOUNDARY = FORM.headers["content-type"]


@given(
    damaged(st.just(FORM.content)) | st.binary(max_size=80),
    st.sampled_from([BOUNDARY, "multipart/form-data", "multipart/form-data; boundary=", URLENCODED])
    | st.text(alphabet=st.characters(codec="latin-1"), max_size=30).map(BOUNDARY.__add__),
)
async def test_whatever_is_sent_as_a_form_is_json_or_malformed(body: bytes, kind: str) -> None:
    headers = Headers(raw=[(b"content-type", kind.encode("latin-1"))])
    try:
        answer = await body_as_json(headers, body)
    except (MalformedRequest, TooLarge) as error:
        error.message.encode()
        return
    if is_form(headers):
        assert isinstance(json.loads(answer), dict)
