"""How much JSON is read: values, depth, and that strings do not count."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdbento.doors.http.json_bounds import MAX_DEPTH, MAX_VALUES, check, read
from sdbento.errors import MalformedRequest, TooLarge


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "value",
    [
        list(range(MAX_VALUES - 1)),
        {f"{i}": i for i in range(MAX_VALUES // 2 - 1)},
        {"prompt": "(a cat:1.2), [a dog], {x}" * 10_000, "negative_prompt": '"\\"[,' * 10_000},
        ["\\" * 1001 + '"', "," * MAX_VALUES],
        "[" * MAX_VALUES,
        {"image": "data:image/png;base64," + "QUJD" * 100_000},
    ],
    ids=["list", "object", "prompts", "escapes", "one string", "image"],
)
def test_what_clients_send_is_read(value: Any) -> None:
    for escaped in (True, False):
        assert read(json.dumps(value, ensure_ascii=escaped).encode()) == value


@pytest.mark.parametrize(
    "text",
    [
        "[" + "1," * MAX_VALUES + "1]",
        '{"a": [' + "[]," * MAX_VALUES + "1]}",
        json.dumps({f"k{i}": i for i in range(MAX_VALUES)}),
        json.dumps([r"\"", *range(MAX_VALUES)]),
        "\ufeff \n[" + "1," * MAX_VALUES,
        '["' + '","' * MAX_VALUES,
        "[" + '""' * 10 * MAX_VALUES + ":" * MAX_VALUES,
    ],
    ids=["numbers", "lists", "keys", "quote", "mark", "unclosed", "quotes"],
)
def test_more_values_than_the_limit_are_refused(text: str) -> None:
    with pytest.raises(TooLarge, match=f"the body may have at most {MAX_VALUES} keys and values"):
        check(text.encode())


def test_nesting_has_a_limit_of_its_own() -> None:
    deepest = json.loads(nested(MAX_DEPTH))
    assert read(nested(MAX_DEPTH).encode()) == deepest
    assert read(f'["{nested(100)}", {nested(MAX_DEPTH - 1)}]'.encode())[1] == deepest[0]
    wide = "[" + ",".join(["[]"] * 200) + "]"
    assert len(read(wide.encode())) == 200
    with pytest.raises(TooLarge, match=f"the field may be nested at most {MAX_DEPTH} deep"):
        check(nested(MAX_DEPTH + 1).encode(), "the field")
    with pytest.raises(TooLarge, match="deep"):
        check(('{"a":' * (MAX_DEPTH + 1)).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b'{"a": ',
        b'{"a": "\xff"}',
        b"9" * 5000,
        '{"a": 1}'.encode("utf-16"),
        ("[" + "1," * MAX_VALUES + "1]").encode("utf-16-le"),
        ("[" + "1," * MAX_VALUES + "1]").encode("utf-32"),
    ],
    ids=["empty", "bytes", "cut off", "latin", "digits", "utf-16", "utf-16-le", "utf-32"],
)
def test_what_is_not_json_in_utf_8_is_refused(body: bytes) -> None:
    with pytest.raises((MalformedRequest, TooLarge)):
        read(body)


def test_a_byte_order_mark_does_no_harm() -> None:
    assert read(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
