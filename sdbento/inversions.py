"""Textual inversions (Gal et al. 2022): words of prompts that stand for learned vectors.

Safetensors files of a folder, by their names; read when a prompt first names one, kept while the
file is the same. No model and no vocabulary is changed: `prompts` puts the vectors in place of the
word. Knows nothing of tokens.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from sdbento.errors import InvalidParameter, classify
from sdbento.families import PICKLED
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MAX_VECTORS = 75  # a chunk
_KEYS = {"clip_l": 0, "clip_g": 1}  # SDXL's two text encoders


@dataclass(frozen=True, eq=False)
class Inversion:
    """One word's vectors, [n, width], by the number of the text encoder they are for."""

    name: str
    vectors: Mapping[int, torch.Tensor]

    def for_encoder(self, index: int, width: int, num_encoders: int) -> torch.Tensor:
        """[n, width]. Raises InvalidParameter for a file that was made for another family."""
        fitting = self.vectors.get(index)
        misses_one = index == 0 and len(self.vectors) != num_encoders
        if misses_one or fitting is None or fitting.shape[1] != width:
            widths = " and ".join(str(vector.shape[1]) for vector in self.vectors.values())
            raise InvalidParameter(
                f"the textual inversion {self.name} has vectors of width {widths}: it was made for "
                "another family of models",
                param="prompt",
            )
        return fitting


class Inversions:
    """The inversions of the settings' folder. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.embeddings_dir
        self._read: dict[Path, tuple[int, Inversion]] = {}  # by file, with its time of change
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def split(self, text: str) -> list[str | Inversion]:
        """The text with the inversions that it names in their places."""
        files = self._files()
        if not files:
            return [text]
        names = "|".join(sorted(map(re.escape, files), key=len, reverse=True))
        pieces = re.split(rf"(?<!\w)({names})(?!\w)", text, flags=re.IGNORECASE)
        return [
            self._get(files[piece.lower()]) if i % 2 else piece
            for i, piece in enumerate(pieces)
            if piece
        ]

    def _files(self) -> dict[str, Path]:
        if not self._folder.is_dir():
            return {}
        found = {}
        for path in sorted(self._folder.rglob("*")):
            if path.suffix == ".safetensors":
                found[path.stem.lower()] = path
            elif path.suffix in PICKLED and path.name not in self._told:
                self._told.add(path.name)
                log.warning("%s is not read: only safetensors are", path)
        return found

    def _get(self, path: Path) -> Inversion:
        with self._lock:
            try:
                changed = path.stat().st_mtime_ns
                known = self._read.get(path)
                if known is None or known[0] != changed:
                    known = self._read[path] = (changed, _read(path))
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
