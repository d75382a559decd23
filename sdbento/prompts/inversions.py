"""Textual inversions (Gal et al. 2022): words of prompts that stand for learned vectors.

They are the safetensors files of a folder, each used by its name. A file is read when a prompt
first names it. Models and vocabularies are not changed: `tokens` and `encoder` put the vectors in
the place of the word. Knows nothing of tokens.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from cachetools import LRUCache
from safetensors.torch import load_file

from sdbento.catalog.families import PICKLED
from sdbento.catalog.folder import list_files
from sdbento.errors import InvalidParameter, classify
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MAX_VECTORS = 75  # a chunk
MAX_KEPT = 256  # files in memory, a few kB each
LISTED_SECONDS = 1.0  # until the folder is listed again; listing it for every word takes too long
SUFFIX = ".safetensors"
_KEYS = {"clip_l": 0, "clip_g": 1}  # SDXL's two text encoders


@dataclass(frozen=True, eq=False)
class Inversion:
    """One word's vectors, [n, width], by the index of the text encoder that they are for."""

    name: str
    vectors: Mapping[int, torch.Tensor]

    def check_encoders(self, encoders: Collection[int]) -> None:
        """Raise InvalidParameter for a file that was made for other text encoders than these."""
        if not self.is_for(encoders):
            raise self._misfit()

    def is_for(self, encoders: Collection[int]) -> bool:
        """Whether it has vectors for these text encoders; of which widths, is not looked at."""
        made_for = self.vectors.keys()
        # The SDXL refiner has the second encoder only, and takes the vectors for it from a file
        # that was made for both.
        return made_for >= set(encoders) and (0 not in encoders or len(made_for) == len(encoders))

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
    """What is in the folder, for LISTED_SECONDS."""

    made_at: float  # time.monotonic()
    files: Mapping[str, Path]  # by name in lower case; a pickled file only where no other has it
    names: re.Pattern[str] | None

    @property
    def is_current(self) -> bool:
        return time.monotonic() - self.made_at < LISTED_SECONDS


def _list(root: Path) -> _Listing:
    made_at = time.monotonic()
    files = list_files(root, (SUFFIX, *PICKLED)).values()
    best_first = sorted(files, key=lambda path: path.suffix != SUFFIX)
    by_name = {path.stem.lower(): path for path in reversed(best_first)}
    words = "|".join(sorted(map(re.escape, by_name), key=len, reverse=True))
    names = re.compile(rf"(?<!\w)({words})(?!\w)", re.IGNORECASE) if words else None
    return _Listing(made_at, by_name, names)


class Inversions:
    """The textual inversions of the settings' folder. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.embeddings_dir
        self._listing = _list(self._folder)
        # By path, time of change and size, so that a file that was replaced is read again.
        self._loaded: LRUCache[tuple[Path, int, int], Inversion] = LRUCache(MAX_KEPT)
        self._lock = threading.Lock()
        self._warned_of: set[Path] = set()

    def split(self, text: str) -> list[str | Inversion]:
        """The text in pieces, with inversions in place of the words that name them.

        May list the folder and read files. Raises InvalidParameter for a file that cannot be read
        or is no textual inversion.
        """
        listing = self._listing
        if not listing.is_current:
            listing = self._listing = _list(self._folder)
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
        if path is None:  # "\u017ftyle" with a long s: to `re` it is "style" in another case
            return word
        if path.suffix == SUFFIX:
            return self._load(path)
        with self._lock:
            if path not in self._warned_of:
                self._warned_of.add(path)
                log.warning("a prompt names %s, which is not read: only safetensors are", path)
        return word

    def _load(self, path: Path) -> Inversion:
        with self._lock:
            try:
                status = path.stat()
                version = (path, status.st_mtime_ns, status.st_size)
                if (inversion := self._loaded.get(version)) is None:
                    inversion = self._loaded[version] = _read(path)
            except InvalidParameter:
                raise
            except Exception as exc:
                reason = classify(exc).message
                raise InvalidParameter(
                    f"the textual inversion {path.stem} cannot be read: {reason}", param="prompt"
                ) from exc
            return inversion


def read_all(folder: Path) -> list[Inversion]:
    """The textual inversions of a folder, by name. Blocking. Files that are none are left out."""
    found = []
    for _, path in sorted(_list(folder).files.items()):
        if path.suffix == SUFFIX:
            try:
                found.append(_read(path))
            except Exception as exc:
                log.info("%s is not listed: %s", path, classify(exc).message)
    return found


def _read(path: Path) -> Inversion:
    """Reads the formats of AUTOMATIC1111 (`emb_params`), diffusers (one key, the token) and SDXL
    (`clip_l` and `clip_g`)."""
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
