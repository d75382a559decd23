"""Puts icons on backgrounds: tensors in, pictures out, on whatever device the icons are.

A data loader could not feed a large GPU; composed there, pictures cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.emoji.captions import COLOURS, Scene

Size = tuple[int, int]
"""Height and width in pixels."""
NOTHING = -1
"""The second icon of a scene that has one."""
SHRUNK = 0.55
"""Icons smaller than this part of the picture are averaged first, or their lines would break."""


@dataclass(frozen=True)
class Layout:
    """`n` scenes: icons (n, k), boxes (n, k, 3), and backgrounds (n, 3) in [0, 1]."""

    icons: Tensor
    boxes: Tensor
    backgrounds: Tensor

    def __len__(self) -> int:
        return len(self.icons)

    def rows(self, chosen: Tensor | slice, device: str | torch.device) -> Layout:
        parts = (self.icons, self.boxes, self.backgrounds)
        return Layout(*(part[chosen].to(device) for part in parts))


def layout_of(scenes: Sequence[Scene]) -> Layout:
    icons = torch.full((len(scenes), 2), NOTHING)
    boxes = torch.full((len(scenes), 2, 3), 0.5)
    for row, scene in enumerate(scenes):
        icons[row, : len(scene.icons)] = torch.tensor(scene.icons)
        boxes[row, : len(scene.boxes)] = torch.tensor(scene.boxes)
    grounds = torch.tensor([COLOURS[scene.background] for scene in scenes]) / 255
    return Layout(icons, boxes, grounds)


def random_layout(
    icons: Tensor, sides: tuple[float, float] = (0.42, 0.92), any_colour: float = 0.0
) -> Layout:
    """Each of `icons` (n,) alone, at a random place, on a random background.

    `any_colour` of the backgrounds are no colours of the palette. Makes no captions, so it
    needs nothing but the device.
    """
    count, device = len(icons), icons.device
    palette = torch.tensor([*COLOURS.values()], device=device) / 255
    grounds = palette[torch.randint(len(palette), (count,), device=device)]
    free = torch.rand(count, 1, device=device) < any_colour
    grounds = torch.where(free, torch.rand(count, 3, device=device), grounds)
    side = sides[0] + (sides[1] - sides[0]) * torch.rand(count, 1, device=device)
    centre = 0.5 + (torch.rand(count, 2, device=device) - 0.5) * (1 - side)
    box = torch.cat([centre, side], dim=1)
    return Layout(icons[:, None], box[:, None], grounds)


def compose(pictures: Tensor, layout: Layout, size: Size | None = None) -> Tensor:
    """Scenes as (n, 3, *size) in [-1, 1], of `pictures`: RGBA bytes (m, 4, side, side).

    size: without one, that of the pictures. A scene is square; in a size that is not, it stands
    in the middle, with more background on two sides.
    """
    side = pictures.shape[-1]
    size = size or (side, side)
    canvas = layout.backgrounds[:, :, None, None].expand(-1, -1, *size)
    for layer in range(layout.icons.shape[1]):
        ink = _placed(pictures, layout.icons[:, layer], layout.boxes[:, layer], size)
        canvas = ink[:, :3] + canvas * (1 - ink[:, 3:])
    return canvas * 2 - 1


def _placed(pictures: Tensor, icons: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Icons in their boxes, colours multiplied by alpha; transparent elsewhere."""
    ink = pictures[icons.clamp(min=0)].float() / 255
    ink = torch.cat([ink[:, :3] * ink[:, 3:], ink[:, 3:]], dim=1)
    coarse = F.interpolate(F.avg_pool2d(ink, 2), scale_factor=2, mode="bilinear")
    ink = torch.where((boxes[:, 2] < SHRUNK)[:, None, None, None], coarse, ink)
    ink = ink * (icons >= 0)[:, None, None, None]
    return F.grid_sample(ink, _grid(boxes, size), align_corners=False)


def _grid(boxes: Tensor, size: Size) -> Tensor:
    """Where in the icon each pixel of the picture lies, for grid_sample."""
    height, width = size
    scale = 1 / boxes[:, 2]
    shift = -(boxes[:, :2] * 2 - 1) * scale[:, None]
    matrix = torch.zeros(len(boxes), 2, 3, device=boxes.device)
    matrix[:, 0, 0] = scale * width / min(size)
    matrix[:, 1, 1] = scale * height / min(size)
    matrix[:, :, 2] = shift
    return F.affine_grid(matrix, [len(boxes), 4, height, width], align_corners=False)
