"""What of a URL may be told to others: neither a user and a password, nor a query or a fragment,
which may hold a token or a signature.

URLs are looked for in any text, also those that are percent-encoded, and those without a scheme.
"""

from __future__ import annotations

import re
from typing import Any

# Each of these takes time linear in the length of a text.
_SCHEME = r"\w+(?::|%3a)(?:/|\\|%2f|%5c){2}"
_URL = re.compile(rf"(?<!\w){_SCHEME}[^\s<>]*", re.IGNORECASE)
_USER = re.compile(rf"^({_SCHEME})[^/\\]*(?:@|%40)", re.IGNORECASE)
_QUERY = re.compile(r"[?#]|%3f|%23|;\w+=", re.IGNORECASE)
_LOOSE_USER = re.compile(r"(//|\\\\)[^/\\\s<>@:]{1,256}:[^/\\\s<>@]{1,256}@")
_LOOSE_QUERY = re.compile(
    r"(?:[?&#;]|%3f|%26|%23|%3b)[\w.~+-]{1,64}(?:=|%3d)[^\s<>]*", re.IGNORECASE
)
_SENTENCES = ",;:.'\")]}"  # what may stand behind a URL and is no part of it


def without_credentials(text: str) -> str:
    """`text`, whose URLs end before their query and name no user."""
    text = _URL.sub(lambda url: _bare(url[0]), text)
    return _LOOSE_QUERY.sub(lambda query: _end(query[0]), _LOOSE_USER.sub(r"\1", text))


def all_without_credentials(value: Any) -> Any:
    """The same for all texts in a value of JSON."""
    match value:
        case str():
            return without_credentials(value)
        case dict():
            return {name: all_without_credentials(item) for name, item in value.items()}
        case list():
            return [all_without_credentials(item) for item in value]
    return value


def _bare(url: str) -> str:
    base, *query = _QUERY.split(url, 1)
    return _USER.sub(r"\1", base) + (_end(url) if query else "")


def _end(text: str) -> str:
    return text[len(text.rstrip(_SENTENCES)) :]
