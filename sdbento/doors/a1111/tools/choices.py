"""What each caller has set by POST options, kept over restarts in one small file.

Knows nothing of HTTP, nor whether there is a model of that name.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sdbento.access.caller import Caller
from sdbento.request.schema import MAX_CLIP_SKIP

log = logging.getLogger(__name__)

MAX_CHOICES = 4096

# The layer of the text encoder to stop at, counted from the last one, which is 1.
ClipStop = Annotated[int, Field(ge=1, le=MAX_CLIP_SKIP + 1)]


class Choice(BaseModel):
    """The settings of one caller that have an effect here."""

    model_config = ConfigDict(frozen=True)

    checkpoint: str | None = None  # a model's name; None: the server's default
    clip_stop: ClipStop = 1


_FILE = TypeAdapter(dict[str, Choice])


class Choices:
    """The choices of all callers, by key, or by address without one. Thread-safe.

    Of MAX_CHOICES callers at most: beyond them the one is forgotten that was made longest ago.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_name = _read(path)
        self._lock = Lock()  # for the file and for `_by_name`

    def of(self, caller: Caller) -> Choice:
        return self._by_name.get(_name(caller), Choice())

    def change(self, caller: Caller, changes: dict[str, Any]) -> None:
        """Change fields of a Choice, and keep it: one that cannot be written holds until the server
        stops. Blocking."""
        with self._lock:
            before = self.of(caller)
            choice = before.model_copy(update=changes)
            if choice == before:
                return
            kept = {name: one for name, one in self._by_name.items() if name != _name(caller)}
            newest_last = [*kept.items(), (_name(caller), choice)]
            self._by_name = dict(newest_last[-MAX_CHOICES:])
            try:
                _write(self._path, _FILE.dump_json(self._by_name))
            except OSError as error:
                log.warning("%s cannot be written, and is lost when we stop: %s", self._path, error)


def _name(caller: Caller) -> str:
    return caller.owner or ""


def _read(path: Path) -> dict[str, Choice]:
    try:
        return _FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read, so that nothing is chosen: %s", path, error)
        return {}


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
