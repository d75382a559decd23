"""Takes out of URLs what may be a secret: user and password, query and fragment.

Prompts and the parameters of images change only where they have a URL with its scheme, so that they
make the same image again. Messages about a request may quote anything, and lose more.
"""

from __future__ import annotations

import re
from typing import Any

# Each of these takes time linear in the length of a text.
_SCHEME = r"\w+(?::|%3a)(?:/|\\|%2f|%5c){2}"
_URL = re.compile(rf"(?<!\w){_SCHEME}[^\s<>]*", re.IGNORECASE)
_NEXT = re.compile(rf"(?<!\w)(?={_SCHEME})", re.IGNORECASE)
_USER = re.compile(rf"^({_SCHEME})[^/\\]*(?:@|%40)", re.IGNORECASE)
_QUERY = re.compile(r"[?#]|%3f|%23|;\w+=", re.IGNORECASE)
_LOOSE_USER = re.compile(r"(//|\\\\)[^/\\\s<>@:]{1,256}:[^/\\\s<>@]{1,256}@")
_LOOSE_QUERY = re.compile(
    r"(?:[?&#;]|%3f|%26|%23|%3b)[\w.~+-]{1,64}(?:=|%3d)[^\s<>]*", re.IGNORECASE
)
_SENTENCES = ",;:.'\")]}"  # what may stand behind a URL and is no part of it


def without_credentials(text: str) -> str:
    """`text`, whose URLs end before their query and name no user. They may be percent-encoded."""
    return _URL.sub(lambda url: _bare(url[0]), text)


def redacted_message(message: str) -> str:
    """`message` without credentials, also those in what may be a URL without a scheme."""
    bare = _LOOSE_USER.sub(r"\1", without_credentials(message))
    return _LOOSE_QUERY.sub(lambda query: _end(query[0]), bare)


def all_without_credentials(value: Any) -> Any:
    """A value of JSON, all of whose texts are `without_credentials`."""
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
    urls = [_USER.sub(r"\1", each) for each in _NEXT.split(base)]  # as in `a://b,c://d`
    return "".join(urls) + (_end(url) if query else "")


def _end(text: str) -> str:
    return text[len(text.rstrip(_SENTENCES)) :]
