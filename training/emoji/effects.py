"""What the additions to `emoji` draw: scenes as pixel art and as outlines.

Pictures are (n, 3, side, side) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK, LEVELS = 8, 5
"""Pixel art: the side of its pixels, and how many levels each channel has."""
STEP, WIDTH = 0.35, 3
"""Outlines: how much a channel changes where there is a line, and how wide lines are."""
BRIGHT = -0.1
"""On a background that is brighter, lines are black, else white."""


def pixel_art(images: Tensor, grounds: Tensor) -> Tensor:
    """Large pixels of few colours; the background (n, 3), in [0, 1], keeps its own."""
    whole = (F.avg_pool2d(images, BLOCK) + 1) / 2
    few = (whole * (LEVELS - 1)).round() / (LEVELS - 1)
    ground = grounds[:, :, None, None]
    few = torch.where((whole - ground).abs().amax(1, keepdim=True) < 0.03, ground, few)
    return F.interpolate(few, scale_factor=BLOCK) * 2 - 1


def outline(images: Tensor, grounds: Tensor) -> Tensor:
    """Lines where colours change, and the background (n, 3), in [0, 1], everywhere else."""
    across = F.pad(images, (1, 1, 0, 0), mode="replicate")
    along = F.pad(images, (0, 0, 1, 1), mode="replicate")
    change = (across[..., 2:] - across[..., :-2]).abs() + (
        along[..., 2:, :] - along[..., :-2, :]
    ).abs()
    lines = change.amax(dim=1, keepdim=True) > 2 * STEP
    lines = F.max_pool2d(lines.float(), WIDTH, 1, WIDTH // 2) > 0
    ground = (grounds * 2 - 1)[:, :, None, None]
    ink = torch.where(ground.mean(dim=1, keepdim=True) > BRIGHT, -0.9, 1.0)
    return torch.where(lines, ink, ground).expand_as(images)


STYLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pixel-art": pixel_art,
    "outline": outline,
}
