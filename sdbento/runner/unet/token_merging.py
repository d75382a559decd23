"""Token merging for Stable Diffusion (Bolya & Hoffman 2023): self-attention over fewer tokens.

Before the self-attention of the blocks of highest resolution, tokens that are alike are averaged;
afterwards each of them gets what came out for the average. Every 2x2 square of tokens has one, its
first, that stays and may take in others of the image (the paper draws one of the four at random).
So an image's tokens follow from the image alone, and not from who shares its call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdbento.models.device import upload


@contextmanager
def merged_tokens(unet: Any, ratio: float, height: int, width: int) -> Iterator[None]:
    """Inside the `with` block, calls of `unet.forward` merge that share of the tokens, at most 3/4.

    height, width: of the latents. Row counts do not change, so adapters work as without it.
    """
    handles = []
    try:
        for attention in _self_attentions(unet) if ratio else ():
            merging = _Merging(ratio, height, width)
            handles.append(attention.register_forward_pre_hook(merging.before))
            handles.append(attention.register_forward_hook(merging.after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _self_attentions(unet: Any) -> list[nn.Module]:
    """Of the first level of the UNet that has transformer blocks, on the way down and up."""
    for down, up in zip(unet.down_blocks, reversed(unet.up_blocks), strict=True):
        found = [
            block.attn1
            for part in (down, up)
            for attention in getattr(part, "attentions", ())
            for block in attention.transformer_blocks
        ]
        if found:
            return found
    return []


class _Merging:
    """The hooks of one attention layer."""

    def __init__(self, ratio: float, height: int, width: int) -> None:
        self._ratio, self._height, self._width = ratio, height, width
        self._merge: Merge | None = None

    def before(self, _attention: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (tokens,) = args
        grid = _grid(tokens.shape[1], self._height, self._width)
        self._merge = match(tokens, self._ratio, *grid)
        return (self._merge.apply(tokens),)

    def after(self, _attention: nn.Module, _args: tuple[Tensor], output: Tensor) -> Tensor:
        merge, self._merge = self._merge, None
        assert merge is not None
        return merge.undo(output)


@dataclass(frozen=True, eq=False)
class Merge:
    """Which tokens of R rows become one. Each row has as many tokens left."""

    kept: Tensor  # [R, K] indices of the N tokens: the targets first, then others that stay alone
    merged: Tensor  # [R, M]: those that are taken in
    targets: Tensor  # [R, M]: where in `kept` each of them goes

    def apply(self, tokens: Tensor) -> Tensor:
        """[R, N, C] to [R, K, C]: every target is the mean of itself and what it takes in."""
        return _take(tokens, self.kept).scatter_reduce(
            1, _wide(self.targets, tokens), _take(tokens, self.merged), reduce="mean"
        )

    def undo(self, tokens: Tensor) -> Tensor:
        """[R, K, C] to [R, N, C]: what was taken in gets what its target has."""
        count = self.kept.shape[1] + self.merged.shape[1]
        whole = tokens.new_empty(tokens.shape[0], count, tokens.shape[2])
        whole.scatter_(1, _wide(self.kept, tokens), tokens)
        return whole.scatter_(1, _wide(self.merged, tokens), _take(tokens, self.targets))


def match(tokens: Tensor, ratio: float, height: int, width: int) -> Merge:
    """The tokens [R, height * width, C] that are most like a target, and that target.

    "Bipartite soft matching" of Bolya et al. 2023, by cosine similarity.
    """
    targets, others = _split(height, width, tokens.device)
    unit = F.normalize(tokens, dim=-1)
    likeness, nearest = (unit[:, others] @ unit[:, targets].mT).max(dim=-1)
    num_merged = min(round(ratio * height * width), len(others))
    order = likeness.argsort(dim=-1, descending=True, stable=True)
    merged, alone = order[:, :num_merged], order[:, num_merged:]
    kept = torch.cat([targets.expand(len(tokens), -1), others[alone]], dim=1)
    return Merge(kept, others[merged], nearest.gather(1, merged))


@lru_cache(maxsize=64)
def _split(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the first token of every 2x2 square, and of all others."""
    first = torch.zeros(height, width, dtype=torch.bool)
    first[::2, ::2] = True
    flat = first.flatten()
    targets, others = (mask.nonzero()[:, 0] for mask in (flat, ~flat))
    return upload(targets, torch.int64, device), upload(others, torch.int64, device)


def _grid(num_tokens: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the tokens, where a UNet has halved those of the latents some times."""
    while height * width > num_tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def _take(tokens: Tensor, indices: Tensor) -> Tensor:
    return tokens.gather(1, _wide(indices, tokens))


def _wide(indices: Tensor, tokens: Tensor) -> Tensor:
    """[R, n] as gather and scatter want it for tokens of C channels: [R, n, C]."""
    return indices[..., None].expand(-1, -1, tokens.shape[-1])
