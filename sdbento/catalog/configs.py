"""Whether the configurations of a model's or ControlNet's parts are such as one can be made of.

They come with the model, and the libraries believe them: a network of a billion layers would keep
the thread that loads models for ever. What the values mean is not looked at here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdbento.catalog.families import refusal
from sdbento.catalog.hub import read_json
from sdbento.catalog.layout import Layout

MAX_NUMBER = 10_000_000  # larger than any width, vocabulary or number of timesteps
COUNTS = ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block")
MAX_COUNT = 64  # of layers; the text encoder with the most has 32
MAX_ITEMS = 1000  # of a list, such as of betas


def check_configs(layout: Layout, folder: Path) -> None:
    """Raises UnsupportedModel for a configuration that cannot be read, or holds numbers that no
    model has."""
    for file in layout.required_configs:
        config = read_json(layout.name, str(folder), file, offline=True, kind=layout.kind)
        for field, value in config.items():
            most = MAX_COUNT if field in COUNTS else MAX_NUMBER
            if any(not -MAX_NUMBER <= number <= most for number in _numbers(value)):
                reason = f"{field[:100]} in its {file} is out of bounds"
                raise refusal(layout.name, reason, layout.kind)


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a value; a list that is too long counts as one that is too large. Without
    recursion: what json has just been able to read may be nested too deeply for that."""
    values = [value]
    while values:
        match values.pop():
            case bool():
                continue
            case int() | float() as number:
                yield number
            case list() as items if len(items) > MAX_ITEMS:
                yield float("inf")
            case list() as items:
                values += items
            case dict() as fields:
                values.append([*fields.values()])
