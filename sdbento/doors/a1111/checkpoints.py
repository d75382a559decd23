"""Models by the names that AUTOMATIC1111's clients have for them."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from sdbento.images.redaction import public_name

if TYPE_CHECKING:
    from sdbento.app import App

_HASH = re.compile(r"\s*\[[0-9a-fA-F]+\]$")
_SUFFIX = re.compile(r"\.(safetensors|ckpt)$", re.IGNORECASE)


async def find_checkpoint(app: App, title: str | None) -> str | None:
    """The name of the model that a title means: with a hash or a file's suffix behind it, without
    the owner of a Hub repository, in any case. A title that no model has which the caller's key
    allows is returned as it is; for none at all, None.
    """
    if title is None or title.casefold() == "none":
        return None
    if app.catalog.known(title) is not None:
        return title
    listed = await asyncio.to_thread(app.catalog.list)
    specs = [spec for spec in listed if app.catalog.is_allowed(spec.name)]
    for spec in specs:  # two files may differ in their suffix alone
        if title == public_name(spec.name):
            return spec.name
    wanted = _plain(title)
    for spec in specs:
        names = {_plain(public_name(name)) for name in spec.names}
        if wanted in names | {name.rpartition("/")[2] for name in names}:
            return spec.name
    return title


def _plain(title: str) -> str:
    return _SUFFIX.sub("", _HASH.sub("", title.strip())).casefold()
