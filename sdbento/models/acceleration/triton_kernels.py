"""What stands between convolutions in channels-last order, as Triton kernels for a GPU.

Tensor cores compute convolutions in that order. torch's own group norm answers in the other one, so
that the next convolution has to turn its input around; and what torch.compile makes of it reads
single numbers far apart. Here three kernels read and write whole rows of channels:

    sums of each channel over chunks of pixels -> its scale and offset -> x * scale + offset, SiLU

torch adds the bias of a convolution in a pass of its own. Here it is part of the shift of the group
norm that follows, or of `add`.

This module can only be imported where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn
from triton import language as tl

CHUNK = 256  # pixels that one program sums up
TILE = 8192  # elements that a program holds at once
WIDEST = 256  # channels of a tile
SUMS = 4096  # of a group, that one program holds at once


def group_norm(
    x: Tensor, norm: nn.GroupNorm, *, silu: bool = False, shift: Tensor | None = None
) -> Tensor:
    """`norm` of x [N, C, h, w], or of x + shift if there is a shift [N, C]; then SiLU, if wanted.

    Computed in float32; the result has the type of x, and is in channels-last order.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    num_images, channels, height, width = x.shape
    pixels, chunks = height * width, triton.cdiv(height * width, CHUNK)
    wide = _wide(channels)
    tile = {"channels": channels, "wide": wide, "high": TILE // wide, "num_warps": 8}
    sums = torch.empty(num_images, chunks, 2, channels, dtype=torch.float32, device=x.device)
    # CUDA's first dimension has room for any number of programs, the second for 65535.
    across = channels // wide
    _sum_up[chunks * across, num_images](x, sums, pixels, chunks, chunk=CHUNK, **tile)
    factors = torch.empty(num_images, 2, channels, dtype=torch.float32, device=x.device)
    in_group = channels // norm.num_groups
    padded = triton.next_power_of_2(in_group)
    _find_factors[norm.num_groups, num_images](
        *(sums, factors, norm.weight, norm.bias, factors if shift is None else shift),
        *(pixels, chunks, norm.eps),
        channels=channels,
        in_group=in_group,
        padded=padded,
        at_once=SUMS // padded,
        shifted=shift is not None,
    )
    y = torch.empty_like(x)
    _apply[triton.cdiv(pixels, TILE // wide) * across, num_images](
        *(x, factors, y, pixels), silu=silu, **tile
    )
    return y


def add(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """a + b + bias, of a and b [N, C, h, w] in channels-last order, and a bias [C]."""
    a, b = (x.contiguous(memory_format=torch.channels_last) for x in (a, b))
    channels, wide = a.shape[1], _wide(a.shape[1])
    rows, high = a.numel() // channels, TILE // wide
    y = torch.empty_like(a)
    _add[triton.cdiv(rows, high) * (channels // wide),](
        *(a, b, bias, y, rows), channels=channels, wide=wide, high=high, num_warps=8
    )
    return y


def _wide(channels: int) -> int:
    """How many channels a tile has: a power of two that divides them."""
    return min(WIDEST, channels & -channels)


# Triton reads the annotations of kernels, so those here have no others than its own.
# They do not specialize on sizes: one that comes for the first time has nothing compiled for it.


@triton.jit
def _place(channels: tl.constexpr, wide: tl.constexpr):
    """A program's block of pixels, and its channels; programs beside it have the same pixels."""
    across = channels // wide
    return tl.program_id(0) // across, tl.program_id(0) % across * wide + tl.arange(0, wide)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _sum_up(
    x,
    sums,
    pixels,
    chunks,
    channels: tl.constexpr,
    wide: tl.constexpr,
    high: tl.constexpr,
    chunk: tl.constexpr,
):
    """sums [N, chunks, 2, C]: of the numbers of each channel, and of their squares."""
    number, channel = _place(channels, wide)
    image = tl.program_id(1)
    x += (image.to(tl.int64) * pixels + number * chunk) * channels
    total = tl.zeros([wide], tl.float32)
    squares = tl.zeros([wide], tl.float32)
    for start in range(0, chunk, high):
        pixel = start + tl.arange(0, high)
        inside = (number * chunk + pixel < pixels)[:, None]
        tile = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        tile = tile.to(tl.float32)
        total += tl.sum(tile, axis=0)
        squares += tl.sum(tile * tile, axis=0)
    sums += (image * chunks + number) * 2 * channels + channel
    tl.store(sums, total)
    tl.store(sums + channels, squares)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _find_factors(
    sums,
    factors,
    weight,
    bias,
    shift,
    pixels,
    chunks,
    eps,
    channels: tl.constexpr,
    in_group: tl.constexpr,
    padded: tl.constexpr,
    at_once: tl.constexpr,
    shifted: tl.constexpr,
):
    """factors [N, 2, C]: the scale and the offset of each channel, of one group."""
    image = tl.program_id(1)
    number = tl.arange(0, padded)
    inside = number < in_group
    channel = tl.program_id(0) * in_group + number
    total = tl.zeros([padded], tl.float32)
    squares = tl.zeros([padded], tl.float32)
    sums += image * chunks * 2 * channels
    for start in range(0, chunks, at_once):
        chunk = start + tl.arange(0, at_once)
        present = (chunk < chunks)[:, None] & inside[None, :]
        at = chunk[:, None] * 2 * channels + channel[None, :]
        total += tl.sum(tl.load(sums + at, mask=present, other=0.0), axis=0)
        squares += tl.sum(tl.load(sums + at + channels, mask=present, other=0.0), axis=0)
    added = tl.zeros([padded], tl.float32)
    if shifted:  # the sums of x + shift follow from those of x
        added = tl.load(shift + image * channels + channel, mask=inside, other=0.0).to(tl.float32)
        squares += added * (2 * total + added * pixels)
        total += added * pixels
    count = pixels * in_group
    mean = tl.sum(total, axis=0) / count
    variance = tl.sum(squares, axis=0) / count - mean * mean
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    factors += image * 2 * channels + channel
    tl.store(factors, scale, mask=inside)
    tl.store(factors + channels, offset + (added - mean) * scale, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _apply(
    x,
    factors,
    y,
    pixels,
    channels: tl.constexpr,
    wide: tl.constexpr,
    high: tl.constexpr,
    silu: tl.constexpr,
):
    block, channel = _place(channels, wide)
    image = tl.program_id(1)
    first, pixel = block * high, tl.arange(0, high)
    inside = (first + pixel < pixels)[:, None]
    scale = tl.load(factors + image * 2 * channels + channel)
    offset = tl.load(factors + image * 2 * channels + channels + channel)
    at = (image.to(tl.int64) * pixels + first) * channels + pixel[:, None] * channels + channel
    tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tile = tile * scale[None, :] + offset[None, :]
    if silu:
        tile = tile * tl.sigmoid(tile)
    tl.store(y + at, tile.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _add(
    a,
    b,
    bias,
    y,
    rows,
    channels: tl.constexpr,
    wide: tl.constexpr,
    high: tl.constexpr,
):
    """Of rows of channels, one for each pixel of all images."""
    block, channel = _place(channels, wide)
    first, row = block * high, tl.arange(0, high)
    inside = (first + row < rows)[:, None]
    at = first.to(tl.int64) * channels + row[:, None] * channels + channel[None, :]
    tile = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    tile += tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    tile += tl.load(bias + channel).to(tl.float32)[None, :]
    tl.store(y + at, tile.to(y.dtype.element_ty), mask=inside)
