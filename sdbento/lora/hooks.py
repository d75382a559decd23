"""LoRA (Hu et al. 2021) on some rows of a batch: several LoRAs a row, each with its own weight.

    y = base(x) + sum over adapters: weight * alpha / rank * up(down(x))

Forward hooks add the sum to the rows that use adapters. So rows with different LoRAs, and rows with
none, share one call of the network, whose own weights are never changed. (PEFT's mixed batches
allow one adapter a row, and one scale for all.) Knows no names and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdbento.lora.layers import LowRank, Parts
from sdbento.models.device import upload

_layers: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA in memory, for one model's layers. `id` is never used again in this process.

    `warnings`: what its users should know of how it fits the model.
    """

    name: str
    id: int
    parts: Parts
    nbytes: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter with the weights that one image gives it."""

    adapter: Adapter
    weight: float  # in the UNet
    text_encoder_weight: float


@contextmanager
def active_adapters(
    module: nn.Module, part: str, rows: Sequence[Sequence[WeightedAdapter]]
) -> Iterator[None]:
    """Inside the `with` block, row i of a call of `module` uses the adapters `rows[i]`.

    `part` says what `module` is: "unet", "text_encoder" or "text_encoder_2". Every call must have
    len(rows) rows, else ValueError; no other thread may call `module` meanwhile. The hooks are
    removed afterwards, also after an error.
    """
    handles = []
    try:
        for layer, hook in _hooks(module, part, rows):
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Share:
    """The rows that use one adapter, and its weight: one for all of them, or one a row."""

    rows: slice | Tensor
    weight: float | Tensor

    def add(self, output: Tensor, layer: nn.Module, low_rank: LowRank, x: Tensor) -> None:
        delta = _delta(layer, low_rank, x[self.rows], self.weight)
        if isinstance(self.rows, slice):
            output[self.rows] += delta
        else:
            output.index_add_(0, self.rows, delta)


@dataclass(frozen=True)
class _Hook:
    """What a layer's adapters add to its output."""

    num_rows: int
    shares: list[tuple[_Share, LowRank]]

    def __call__(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        (x,) = args
        if len(x) != self.num_rows:
            raise ValueError(f"a call of {len(x)} rows where {self.num_rows} were announced")
        for share, low_rank in self.shares:
            share.add(output, layer, low_rank, x)  # in place: the layer has just made `output`


def _delta(layer: nn.Module, low_rank: LowRank, x: Tensor, weight: float | Tensor) -> Tensor:
    """What the adapter adds: [rows, ..., out], or [rows, out, height, width] of a convolution."""
    if isinstance(layer, nn.Conv2d):
        inner = F.conv2d(x, low_rank.down, None, layer.stride, layer.padding, layer.dilation)
    else:
        inner = F.linear(x, low_rank.down)
    if isinstance(weight, Tensor):
        weight = weight.view(-1, *[1] * (inner.dim() - 1))
    inner = inner * (weight * low_rank.scale)
    return F.conv2d(inner, low_rank.up) if inner.dim() == 4 else F.linear(inner, low_rank.up)


def _hooks(
    module: nn.Module, part: str, rows: Sequence[Sequence[WeightedAdapter]]
) -> Iterator[tuple[nn.Module, _Hook]]:
    hooks: dict[str, _Hook] = {}
    for adapter, weights in _by_adapter(part, rows):
        share = _share(weights, next(iter(adapter.parts[part].values())).down)
        for name, low_rank in adapter.parts[part].items():
            hooks.setdefault(name, _Hook(len(rows), [])).shares.append((share, low_rank))
    if not hooks:
        return
    if (layers := _layers.get(module)) is None:
        layers = _layers[module] = {name: layer for name, layer in module.named_modules() if name}
    for name, hook in hooks.items():
        yield layers[name], hook


def _by_adapter(
    part: str, rows: Sequence[Sequence[WeightedAdapter]]
) -> list[tuple[Adapter, dict[int, float]]]:
    """Every adapter that changes `part`, with its weight on each row that uses it."""
    found: dict[int, tuple[Adapter, dict[int, float]]] = {}
    for i, row in enumerate(rows):
        for use in row:
            weight = use.weight if part == "unet" else use.text_encoder_weight
            if weight and use.adapter.parts.get(part):
                _, weights = found.setdefault(use.adapter.id, (use.adapter, {}))
                weights[i] = weights.get(i, 0.0) + weight
    return list(found.values())


def _share(weights: Mapping[int, float], like: Tensor) -> _Share:
    """`weights` by row, with tensors on the device and in the precision of `like`."""
    indices, values = list(weights), list(weights.values())
    first, last = indices[0], indices[-1]
    rows: slice | Tensor = slice(first, last + 1)
    if last + 1 - first != len(indices):
        rows = upload(indices, torch.int64, like.device)
    if len(set(values)) == 1:
        return _Share(rows, values[0])
    return _Share(rows, upload(values, like.dtype, like.device))
