"""The keys that a request presents, whatever way its client has of sending one. Judges none."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MAX_KEY_BYTES = 512  # nobody's key is longer; nothing longer is hashed

Headers = Iterable[tuple[bytes, bytes]]  # as in an ASGI scope


@dataclass(frozen=True)
class Credential:
    """A key that a request presents, and the user's name if it came with one."""

    key: bytes = field(repr=False)
    user: str | None = None


def presented(headers: Headers) -> list[Credential]:
    """The keys in `Authorization` (Bearer, Basic, or a bare key as RunPod's API takes it) and
    `X-API-Key`. At most one each, so that a request is one guess or two."""
    found = dict(reversed([*headers]))  # the first of each name
    credentials = [
        *_authorization(found.get(b"authorization", b"").strip()),
        Credential(found.get(b"x-api-key", b"").strip()),
    ]
    return [one for one in credentials if 0 < len(one.key) <= MAX_KEY_BYTES]


def _authorization(header: bytes) -> Iterator[Credential]:
    scheme, rest = (*header.split(None, 1), b"", b"")[:2]
    match scheme.lower(), rest:
        case b"basic", encoded:
            yield from _basic(encoded)
        case b"bearer", key:
            yield Credential(key)
        case _, b"":
            yield Credential(scheme)


def _basic(encoded: bytes) -> Iterator[Credential]:
    """`anything:key`; also `key:` and `key`, as clients send a key that they take for a user."""
    try:
        decoded = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error:
        return
    user, _, key = decoded.partition(b":")
    if key:
        yield Credential(key, user.decode("utf-8", "replace"))
    else:
        yield Credential(user)
