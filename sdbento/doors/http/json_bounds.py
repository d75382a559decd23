"""How much JSON is read at all: a body of a few megabytes can hold millions of values.

Parsing takes the interpreter for itself, on a thread as well, and all other requests wait: 2.4
million keys in 28 MB took 11 s and 700 MB. So the values are counted first, which takes
milliseconds. What a request means is the parser's business.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sdbento.errors import MalformedRequest, TooLarge

MAX_VALUES = 20_000  # keys count as well; the largest bodies that clients send have some hundreds
MAX_PART_VALUES = 1000  # where a field's text is JSON, for there may be a hundred fields
MAX_DEPTH = 64

_CONTAINER = re.compile(rb"(?:\xef\xbb\xbf)?\s*[\[{]")
_NESTING = re.compile(rb"[\[{]+|[\]}]+")
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def check(text: bytes, what: str = "the body", max_values: int = MAX_VALUES) -> None:
    """Raises TooLarge (413) if a parser should not be given `text`, which may be JSON or not.

    It is not malformed (400): there is only more of it than is read. What begins neither an object
    nor a list has one value, or is not JSON in UTF-8, which parsers notice at once.
    """
    if not _CONTAINER.match(text):
        return
    if _num_values(text) <= max_values and _num_brackets(text) <= MAX_DEPTH:
        return  # whatever its strings contain; so most bodies are looked at only once
    bare = _without_strings(text, 2 * max_values)
    if bare is None or _num_values(bare) > max_values:
        raise TooLarge(f"{what} may have at most {max_values} keys and values")
    if _depth(bare) > MAX_DEPTH:
        raise TooLarge(f"{what} may be nested at most {MAX_DEPTH} deep")


def read(text: bytes, what: str = "the body") -> Any:
    """The value of a JSON text in UTF-8, as RFC 8259 has it, which `check` has let pass: the Guard
    checks each body. Raises MalformedRequest."""
    try:
        return json.loads(text.decode().removeprefix(_BOM))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MalformedRequest(f"{what} is not JSON: {error}") from None
    except ValueError:  # Python's bound for integers
        raise MalformedRequest(f"{what} has a number of thousands of digits") from None


def _num_values(text: bytes) -> int:
    """Keys and values, if `text` has no strings; more than that, if it has."""
    return text.count(b",") + text.count(b":") + _num_brackets(text) + 1


def _num_brackets(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _without_strings(text: bytes, max_quotes: int) -> bytes | None:
    """What is between the strings of a JSON text; None if it has more than that many quotes."""
    unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > max_quotes:
        return None
    return b"".join(unescaped.split(b'"')[::2])


def _depth(bare: bytes) -> int:
    depth = deepest = 0
    for found in _NESTING.finditer(bare):
        brackets = found.group()
        depth += len(brackets) if brackets[0] in b"[{" else -len(brackets)
        deepest = max(deepest, depth)
    return deepest
