"""Takes out of texts and names what must not leave this machine: credentials, signatures, folders.

For what is embedded in files, which are passed on, and for names that other programs show.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePath

from sdbento.outbound.urls import is_url
from sdbento.url_redaction import without_credentials

_LORA_TAG = re.compile(r"(<lora:)([^<>:]*)", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """`text` without the credentials and queries of the URLs in it, nor the folders in its LoRA
    tags."""
    return _LORA_TAG.sub(lambda tag: tag[1] + public_name(tag[2]), without_credentials(text))


def public_name(name: str) -> str:
    """A model's or LoRA's name without folders and secrets."""
    if is_url(name):
        return without_credentials(name)
    path = PurePath(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or _is_here(name)
    return path.name if is_path else name


def _is_here(name: str) -> bool:
    """Whether a name such as `a/b`, which may also be a Hub id, is a path of this machine."""
    return os.path.exists(name) or os.path.exists(f"{name}.safetensors")
