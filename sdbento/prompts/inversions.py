"""Textual inversions (Gal et al. 2022): words of prompts that stand for learned vectors.

Safetensors files of a folder, by their names; read when a prompt first names one, kept while the
file is the same. No model and no vocabulary is changed: `prompts` puts the vectors in place of the
word. Knows nothing of tokens.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from sdbento.catalog.families import PICKLED
from sdbento.errors import InvalidParameter, classify
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MAX_VECTORS = 75  # a chunk
SUFFIX = ".safetensors"
SETTLED = 1_000_000_000  # ns after which a folder's time of change tells it from a later one
_KEYS = {"clip_l": 0, "clip_g": 1}  # SDXL's two text encoders


@dataclass(frozen=True, eq=False)
class Inversion:
    """One word's vectors, [n, width], by the number of the text encoder they are for."""

    name: str
    vectors: Mapping[int, torch.Tensor]

    def check_encoders(self, encoders: Collection[int]) -> None:
        """Raise InvalidParameter for a file that was made for other text encoders than these."""
        made_for = self.vectors.keys()
        # The SDXL refiner has the second encoder only, and takes the vectors for it from a file
        # that was made for both.
        if not made_for >= set(encoders) or (0 in encoders and len(made_for) != len(encoders)):
            raise self._misfit()

    def for_encoder(self, index: int, width: int) -> torch.Tensor:
        """[n, width]. Raises InvalidParameter where the vectors have another width."""
        vectors = self.vectors[index]
        if vectors.shape[1] != width:
            raise self._misfit()
        return vectors

    def _misfit(self) -> InvalidParameter:
        widths = " and ".join(str(vectors.shape[1]) for vectors in self.vectors.values())
        return InvalidParameter(
            f"the textual inversion {self.name} has vectors of width {widths}: it was made for "
            "another family of models",
            param="prompt",
        )


@dataclass(frozen=True)
class _Listing:
    """What lies in the folder, as of `made_at`."""

    made_at: int  # ns
    changes: Mapping[Path, int | None]  # by folder
    files: Mapping[str, Path]  # by name in lower case; a pickle only where nothing else has it
    names: re.Pattern[str] | None

    @property
    def is_current(self) -> bool:
        """A folder that changed just before it was listed may have changed again since, within the
        resolution of its file system's clock."""
        return all(
            _changed(folder) == change and (change is None or change + SETTLED < self.made_at)
            for folder, change in self.changes.items()
        )


def _changed(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _listing(root: Path) -> _Listing:
    made_at, changes, found = time.time_ns(), {root: _changed(root)}, []
    for name, _, files in os.walk(root):
        folder = Path(name)
        changes[folder] = _changed(folder)
        found += [folder / file for file in files]
    readable = sorted(path for path in found if path.suffix == SUFFIX)
    pickled = [path for path in found if path.suffix in PICKLED]
    by_name = {path.stem.lower(): path for path in (*pickled, *readable)}
    words = "|".join(sorted(map(re.escape, by_name), key=len, reverse=True))
    names = re.compile(rf"(?<!\w)({words})(?!\w)", re.IGNORECASE) if words else None
    return _Listing(made_at, changes, by_name, names)


class Inversions:
    """The inversions of the settings' folder. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.embeddings_dir
        self._listing = _listing(self._folder)
        self._read: dict[Path, tuple[tuple[int, int], Inversion]] = {}  # with the file's version
        self._lock = threading.Lock()
        self._told: set[Path] = set()

    def split(self, text: str) -> list[str | Inversion]:
        """The text with the inversions that it names in their places."""
        listing = self._listing
        if not listing.is_current:
            listing = self._listing = _listing(self._folder)
        if listing.names is None:
            return [text]
        pieces: list[str | Inversion] = []
        for i, part in enumerate(listing.names.split(text)):
            piece = self._find(part, listing) if i % 2 else part
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += piece  # in one piece, as the tokenizer is to read it
            elif piece:
                pieces.append(piece)
        return pieces

    def _find(self, word: str, listing: _Listing) -> str | Inversion:
        path = listing.files.get(word.lower())
        if path is None:  # a letter such as the long s, which only `re` takes for another's case
            return word
        if path.suffix == SUFFIX:
            return self._get(path)
        with self._lock:
            if path not in self._told:
                self._told.add(path)
                log.warning("a prompt names %s, which is not read: only safetensors are", path)
        return word

    def _get(self, path: Path) -> Inversion:
        with self._lock:
            try:
                status = path.stat()
                version = (status.st_mtime_ns, status.st_size)
                known = self._read.get(path)
                if known is None or known[0] != version:
                    known = self._read[path] = (version, _read(path))
            except InvalidParameter:
                raise
            except Exception as exc:
                reason = classify(exc).message
                raise InvalidParameter(
                    f"the textual inversion {path.stem} cannot be read: {reason}", param="prompt"
                ) from exc
            return known[1]


def _read(path: Path) -> Inversion:
    """The formats of AUTOMATIC1111 (`emb_params`), diffusers (one key, the token) and SDXL."""
    tensors = {
        name: tensor.float().reshape(-1, tensor.shape[-1])
        for name, tensor in load_file(path).items()
        if tensor.dim() in (1, 2)
    }
    if tensors.keys() == _KEYS.keys():
        vectors = {_KEYS[name]: tensor for name, tensor in tensors.items()}
    elif "emb_params" in tensors:
        vectors = {0: tensors["emb_params"]}
    elif len(tensors) == 1:
        vectors = {0: next(iter(tensors.values()))}
    else:
        raise InvalidParameter(
            f"the textual inversion {path.stem} is in no format that is known", param="prompt"
        )
    counts = {len(tensor) for tensor in vectors.values()}
    if len(counts) != 1 or not 1 <= max(counts) <= MAX_VECTORS:
        raise InvalidParameter(
            f"the textual inversion {path.stem} must have 1 to {MAX_VECTORS} vectors, as many for "
            "each text encoder",
            param="prompt",
        )
    return Inversion(path.stem, vectors)
