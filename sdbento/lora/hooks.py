"""LoRA (Hu et al. 2021) on some rows of a call: several a row, each with its own weight.

    y = base(x) + sum over adapters: weight * alpha / rank * up(down(x))

is added by forward hooks for the rows that want it, so that rows with different LoRAs, and rows
with none, share one call of the network; its own weights are never touched. PEFT's mixed batches
know one adapter a row at one scale. Knows names and files only through `lora_files`.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdbento.lora.files import LoraSource, locate, read
from sdbento.lora.layers import LowRank, Parts, num_bytes, to_parts
from sdbento.models.pipeline import Pipeline
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MB = 1e6
_ids = itertools.count(1)
_layers: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA in memory, for one model's layers. `id` is never used again in this process."""

    name: str
    id: int
    parts: Parts
    nbytes: int


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter as one image wants it."""

    adapter: Adapter
    weight: float  # in the UNet
    text_encoder_weight: float


@contextmanager
def applied(
    module: nn.Module, part: str, rows: Sequence[Sequence[WeightedAdapter]]
) -> Iterator[None]:
    """While active, row i of a call of `module` computes with the adapters `rows[i]`.

    `part`: "unet", "text_encoder" or "text_encoder_2". All calls must have len(rows) rows, and
    nobody else may call `module` meanwhile. The hooks are gone afterwards, also after an error.
    """
    handles = []
    try:
        for layer, hook in _hooks(module, part, rows):
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class AdapterCache:
    """The adapters in memory, by model, least recently used first; they go with their model.

    Thread-safe: one lock guards the order; loading happens outside of it, once for all who ask.
    Who still needs an evicted adapter keeps it alive by holding it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: WeakKeyDictionary[Pipeline, OrderedDict[LoraSource, Future[Adapter]]] = (
            WeakKeyDictionary()
        )
        self._lock = threading.Lock()

    def get(self, pipeline: Pipeline, name: str) -> Adapter:
        """The LoRA of that name on `pipeline`'s device. Blocking: may read or download a file.

        Raises what `locate` and `read` raise, and UnsupportedModel for a LoRA that does not fit.
        """
        source = locate(name, self._settings)
        with self._lock:
            loaded = self._loaded.setdefault(pipeline, OrderedDict())
            future = loaded.get(source)
            is_new = future is None
            if future is None:
                for outdated in [old for old in loaded if old.name == source.name]:
                    del loaded[outdated]
                future = loaded[source] = Future()
            loaded.move_to_end(source)
        if is_new:
            self._load(pipeline, source, future, loaded)
        return future.result()

    def resident(self, pipeline: Pipeline) -> list[str]:
        """Names of the LoRAs that are loaded, the least recently used first."""
        with self._lock:
            loaded = self._loaded.get(pipeline, OrderedDict())
            return [source.name for source, future in loaded.items() if future.done()]

    def _load(
        self,
        pipeline: Pipeline,
        source: LoraSource,
        future: Future[Adapter],
        loaded: OrderedDict[LoraSource, Future[Adapter]],
    ) -> None:
        try:
            adapter = load(pipeline, source, self._settings)
        except BaseException as error:
            with self._lock:
                if loaded.get(source) is future:
                    del loaded[source]
            future.set_exception(error)
            return
        with self._lock:
            future.set_result(adapter)
            done = [key for key, other in loaded.items() if other.done()]
            for oldest in done[: max(0, len(done) - self._settings.max_loras)]:
                del loaded[oldest]
                log.info("LoRA %s leaves model %s", oldest.name, pipeline.spec.name)


def load(pipeline: Pipeline, source: LoraSource, settings: Settings) -> Adapter:
    """A file to matrices on the model's device, in its precision."""
    parts = to_parts(source, read(source, settings), pipeline)
    adapter = Adapter(source.name, next(_ids), parts, num_bytes(parts))
    log.info(
        "LoRA %s is on %s for model %s: %.1f MB, %d layers",
        *(source.name, pipeline.device, pipeline.spec.name, adapter.nbytes / MB),
        sum(map(len, parts.values())),
    )
    return adapter


@dataclass(frozen=True)
class _Share:
    """Rows that use one adapter, and its weight on them: one for all, or one a row."""

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
    num_rows: int
    shares: list[tuple[_Share, LowRank]]

    def __call__(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        (x,) = args
        if len(x) != self.num_rows:
            raise ValueError(f"a call of {len(x)} rows where {self.num_rows} were announced")
        for share, low_rank in self.shares:
            share.add(output, layer, low_rank, x)  # fresh from the layer: nobody else has it


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
        share = _share(weights, len(rows), next(iter(adapter.parts[part].values())).down)
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
    """Every adapter that has that part, with its weight on each row that uses it."""
    found: dict[int, tuple[Adapter, dict[int, float]]] = {}
    for i, row in enumerate(rows):
        for use in row:
            weight = use.weight if part == "unet" else use.text_encoder_weight
            if weight and use.adapter.parts.get(part):
                _, weights = found.setdefault(use.adapter.id, (use.adapter, {}))
                weights[i] = weights.get(i, 0.0) + weight
    return list(found.values())


def _share(weights: Mapping[int, float], num_rows: int, like: Tensor) -> _Share:
    indices, values = list(weights), list(weights.values())
    first, last = indices[0], indices[-1]
    rows: slice | Tensor = slice(first, last + 1)
    if last + 1 - first != len(indices):
        rows = torch.tensor(indices, device=like.device)
    if len(set(values)) == 1:
        return _Share(rows, values[0])
    return _Share(rows, torch.tensor(values, dtype=like.dtype, device=like.device))
