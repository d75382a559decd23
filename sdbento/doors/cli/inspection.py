"""`sdbento inspect`: what an image file says of how it was made. Needs no model."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import click

from sdbento.images.metadata import Metadata, read_metadata

# The file may come from anywhere: no terminal is to obey what its texts contain.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def inspect(path: Path) -> Metadata:
    """Raises click.ClickException for a file that cannot be read or says nothing, and
    InvalidParameter for one that is no image."""
    try:
        metadata = read_metadata(path.read_bytes())
    except OSError as error:
        raise click.ClickException(f"cannot read {path}: {error.strerror}") from None
    if metadata == Metadata():
        raise click.ClickException(f"{path} does not say how it was made")
    return metadata


def as_text(metadata: Metadata) -> str:
    """The infotext, then our parameters as JSON, as far as they are there."""
    parameters = metadata.parameters and _as_json(metadata.parameters)
    return "\n\n".join(_printable(text) for text in (metadata.infotext, parameters) if text)


def as_json(metadata: Metadata) -> str:
    """One object with `infotext` and `parameters`, null where a file does not have them."""
    return _printable(_as_json(asdict(metadata)))


def _as_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _printable(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
