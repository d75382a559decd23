"""Captioned pictures as latents and tokens, which the text encoder and the UNet are trained on.

Scenes and captions are made first (`prepare`, on the CPU, beside the autoencoder's training).
Then all pictures are encoded once, and training needs nothing but what is on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from training.emoji.budget import autocast, memory_format, save
from training.emoji.captions import NEGATIVES, Catalogue
from training.emoji.compose import Layout, Size, compose, layout_of
from training.emoji.icons import SIDE, read_index, read_pictures
from training.emoji.networks import Scale, tokenize
from training.tokenizer import build_tokenizer, save_tokenizer

UNSAID = 0.05
"""Of the captions a batch leaves out so many, beside the empty ones that scenes have."""
ENCODED = 256  # pictures at once


@dataclass(frozen=True)
class Pool:
    """Latents (n, 4, h, w), scaled, tokens of their captions (n, 77), and of an empty one."""

    latents: Tensor
    tokens: Tensor
    empty: Tensor

    def batch(self, size: int, unsaid: float = UNSAID) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.latents), (size,), device=self.latents.device)
        return self.at(rows, unsaid)

    def at(self, rows: Tensor, unsaid: float) -> tuple[Tensor, Tensor]:
        silent = torch.rand(len(rows), 1, device=rows.device) < unsaid
        return self.latents[rows].float(), torch.where(silent, self.empty, self.tokens[rows]).long()


def vocabulary(catalogue: Catalogue) -> Iterator[str]:
    """What the tokenizer learns its merges from: captions, and all words that can occur."""
    rng = np.random.default_rng(7)
    for _ in range(20_000):
        yield catalogue.sample(rng).caption
    for icon in catalogue.icons:
        yield from (icon.name, *icon.synonyms)
    yield from list(NEGATIVES) * 20


def prepare(out: Path, scale: Scale, seed: int) -> None:
    """Writes out/tokenizer, unless it is there, and out/scenes.pt."""
    if not (out / "tokenizer").exists():
        words = vocabulary(Catalogue(read_index(out / "icons.zip")))
        save_tokenizer(build_tokenizer(words, scale.merges), out / "tokenizer")
    layout, tokens = sample_scenes(out, scale.scenes, seed)
    save(out / "scenes.pt", (layout.icons, layout.boxes, layout.backgrounds, tokens))
    for made_of_them in (*out.glob("latents*.pt"), out / "sizes.pt", out / "edges.pt"):
        made_of_them.unlink(missing_ok=True)
    print(f"{len(layout)} scenes", flush=True)


def sample_scenes(out: Path, count: int, seed: int) -> tuple[Layout, Tensor]:
    """Random scenes and the tokens of their captions, (count, 77)."""
    catalogue = Catalogue(read_index(out / "icons.zip"))
    rng = np.random.default_rng(seed)
    scenes = [catalogue.sample(rng) for _ in range(count)]
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    return layout_of(scenes), tokenize(tokenizer, [scene.caption for scene in scenes])


def load_scenes(out: Path, count: int | None = None) -> tuple[Layout, Tensor]:
    """The first scenes of out/scenes.pt, or all, and the tokens of their captions."""
    *layout, tokens = torch.load(out / "scenes.pt")
    return Layout(*layout).rows(slice(count), "cpu"), tokens[:count]


def composed(out: Path, layout: Layout, device: str, size: Size | None = None) -> Iterator[Tensor]:
    """The scenes of a layout in parts, (ENCODED, 3, *size); fewer at once if they are larger."""
    pictures = read_pictures(out / "icons.zip").to(device)
    count = ENCODED if size is None else max(1, ENCODED * SIDE**2 // math.prod(size))
    for start in range(0, len(layout), count):
        yield compose(pictures, layout.rows(slice(start, start + count), device), size)


@torch.no_grad()
def encode(out: Path, parts: Iterable[Tensor], device: str) -> Tensor:
    """Scaled latents of pictures in parts, (n, 4, h, w), in half precision."""
    vae = AutoencoderKL.from_pretrained(out / "vae", dtype=torch.float32)
    vae = vae.to(device, memory_format=memory_format(device)).eval()
    latents = []
    for images in parts:
        with autocast(device):
            images = images.contiguous(memory_format=memory_format(device))
            mode = vae.encode(images).latent_dist.mode()
        latents.append((mode * vae.config.scaling_factor).to(torch.bfloat16))
    return torch.cat(latents)


def load_pool(out: Path, device: str) -> Pool:
    """The pool on `device`; the first call encodes the pictures and writes out/latents.pt."""
    started = time.monotonic()
    layout, tokens = load_scenes(out)
    if not (out / "latents.pt").exists():
        save(out / "latents.pt", encode(out, composed(out, layout, device), device))
    latents = torch.load(out / "latents.pt", map_location=device)
    empty = tokenize(CLIPTokenizer.from_pretrained(out / "tokenizer"), [""])
    deviation = float(latents.float().std())
    seconds = time.monotonic() - started
    print(f"{len(latents)} latents, deviation {deviation:.3f}, {seconds:.0f} s", flush=True)
    return Pool(latents, tokens.to(device), empty.to(device))


def load_sizes(out: Path, plain: Pool, sizes: Mapping[Size, int], device: str) -> dict[Size, Pool]:
    """The first scenes of `plain` at other sizes, so many of each; made by the first call."""
    path = out / "sizes.pt"
    if not path.exists():
        save(path, {size: _latents_at(out, size, count, device) for size, count in sizes.items()})
    latents: dict[Size, Tensor] = torch.load(path, map_location=device)
    return {size: Pool(own, plain.tokens[: len(own)], plain.empty) for size, own in latents.items()}


def _latents_at(out: Path, size: Size, count: int, device: str) -> Tensor:
    layout, _ = load_scenes(out, count)
    return encode(out, composed(out, layout, device, size), device)
