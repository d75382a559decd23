"""The icons that `emoji` is trained on: one file of small pictures with their names.

render.py writes the file; everything else reads it here. Knows nothing of SVG or captions.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OUT = Path(__file__).parent / "out"
"""Where all stages work, unless they are told another folder."""
SIDE = 128
QUALITY = 80
"""Of the WebP pictures: all of them together take about 15 MB, transparency included."""


@dataclass(frozen=True)
class Icon:
    """One picture: `name` in words ("red apple"), and words that mean the same."""

    style: str
    name: str
    synonyms: tuple[str, ...] = ()


def write(path: Path, icons: Iterable[tuple[Icon, Image.Image]]) -> None:
    """Writes icons with their RGBA pictures; a reader never sees half a file."""
    beside = path.with_suffix(".new")
    index: list[dict[str, object]] = []
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        for icon, picture in icons:
            content = io.BytesIO()
            picture.save(content, "WEBP", quality=QUALITY, method=4)
            archive.writestr(f"{len(index):05}.webp", content.getvalue())
            index.append(asdict(icon))
        archive.writestr("index.json", json.dumps(index))
    beside.rename(path)


def read_index(path: Path) -> list[Icon]:
    """The icons without their pictures."""
    with zipfile.ZipFile(path) as archive:
        rows = json.loads(archive.read("index.json"))
    return [Icon(row["style"], row["name"], tuple(row["synonyms"])) for row in rows]


def read_pictures(path: Path) -> Tensor:
    """RGBA bytes of all icons in the order of the index, (n, 4, SIDE, SIDE)."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
        contents = [archive.read(name) for name in names]
    with ThreadPoolExecutor() as pool:
        pictures = np.stack(list(pool.map(_decode, contents)))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _decode(content: bytes) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
