"""How much JSON is read: values, depth, and that strings do not count."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbento.doors.http.json_bounds import MAX_DEPTH, MAX_VALUES, check, read
from sdbento.errors import MalformedRequest, TooLarge
from tests.support.damage import damaged


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


# Whatever the text: no more is read than the limit, and nothing is refused that is within it.

LIMIT = 12
TEXTS = st.text(st.sampled_from('\\"[]{},: a\n\u20ac'), max_size=8)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
PIECES = st.sampled_from(['"', "\\", '\\"', "[", "]", "{", "}", ",", ":", "1", '"a"', '{"a":', " "])
FILES = (
    damaged(VALUES.map(lambda value: json.dumps(value).encode()))
    | st.lists(PIECES, max_size=50).map(lambda pieces: ("[" + "".join(pieces)).encode())
    | st.binary(max_size=40)
)


def is_read(text: bytes) -> bool:
    try:
        check(text, max_values=LIMIT)
    except TooLarge:
        return False
    return True


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_json_is_read_exactly_if_its_values_are_within_the_limit(
    value: Any, escaped: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    assert is_read(text.encode()) is (num_values(value) <= LIMIT)


def num_values(value: Any) -> int:
    """Keys and values; an empty list or object counts as if there were one in it."""
    match value:
        case dict():
            return 1 + max(1, sum(1 + num_values(inner) for inner in value.values()))
        case list():
            return 1 + max(1, sum(map(num_values, value)))
    return 1


@given(FILES)
def test_a_parser_comes_to_no_more_values_than_the_limit_in_any_text(text: bytes) -> None:
    assert not is_read(text) or num_begun(text) <= LIMIT


def num_begun(text: bytes) -> int:
    """How many values a parser can have begun before the end, or before what no JSON has."""
    if not text.lstrip().startswith((b"[", b"{")):
        return 1
    begun, inside, is_escaped = 1, False, False
    for char in text:
        if inside:
            inside = is_escaped or char != ord('"')
            is_escaped = not is_escaped and char == ord("\\")
        elif char == ord("\\"):
            break
        elif char == ord('"'):
            inside = True
        else:
            begun += char in b",:[{"
    return begun
