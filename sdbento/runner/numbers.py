"""The numbers of a step, a few for each row and image: packed, so that one copy takes them all.

Timesteps, scales, sampler coefficients and indices are known on the host. Each would cost a copy of
its own; and a copy from memory that is not pinned waits until the device has nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sdbento.models.device import host_tensor


@dataclass(frozen=True)
class Layout:
    """The sizes of a step: UNet rows, images, and slots of each image (latents and memory)."""

    rows: int
    images: int
    slots: int

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and type of every field of Numbers, in the order in which they are packed."""
        rows, images, slots = (self.rows,), (self.images,), self.slots
        yield "timesteps", rows, torch.float32
        yield "input_scale", rows, torch.float32
        yield "image_of_row", rows, torch.int32
        yield "guidance_scale", images, torch.float32
        yield "guidance_rescale", images, torch.float32
        yield "negative_row", images, torch.int32
        yield "matrices", (*images, slots, slots + 1), torch.float32

    @property
    def size(self) -> int:
        """Of the packed buffer, in numbers of 4 bytes."""
        return sum(prod(shape) for _, shape, _ in self.shapes())


@dataclass(frozen=True, eq=False)
class Numbers:
    """Views into one buffer, on the host or on the device. R rows, B images, S slots.

    Row b is that of image b with its prompt, for b < B; the rows with negative prompts follow.
    """

    packed: Tensor
    timesteps: Tensor  # [R], as the UNet reads them
    input_scale: Tensor  # [R], what the latents are multiplied with for the UNet
    image_of_row: Tensor  # [R] int32
    guidance_scale: Tensor  # [B]; 1 without guidance
    guidance_rescale: Tensor  # [B]; 0: none
    negative_row: Tensor  # [B] int32; without guidance its own row
    matrices: Tensor  # [B, S, 1 + S], of the samplers; columns: latents, model output, memory

    def to(self, layout: Layout, device: torch.device) -> Numbers:
        """On the device, by one copy that nobody waits for."""
        return views(self.packed.to(device, non_blocking=True), layout)


def views(packed: Tensor, layout: Layout) -> Numbers:
    """The fields of a packed buffer, float32 of `layout.size`."""
    fields: dict[str, Tensor] = {}
    begin = 0
    for name, shape, dtype in layout.shapes():
        end = begin + prod(shape)
        fields[name] = packed[begin:end].view(dtype).view(shape)
        begin = end
    return Numbers(packed, **fields)


def host_numbers(layout: Layout, device: torch.device) -> Numbers:
    """Memory of the host for the numbers of one step, which `device` can read directly.

    Fresh memory for each step: torch keeps it from being used again until the copy is done.
    """
    return views(host_tensor((layout.size,), torch.float32, device).zero_(), layout)
