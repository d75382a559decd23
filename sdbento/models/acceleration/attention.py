"""Which kernels compute the attention of a UNet or ControlNet: those that measured fastest.

torch has several of its own for `scaled_dot_product_attention` (SDPA): cuDNN's, FlashAttention and
a memory-efficient one; xformers brings others. Which is the fastest depends on the GPU and on the
widths of heads. So on a GPU a network's own layers are timed with each of them when it is loaded.
On a CPU there is nothing to choose.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from operator import mul
from typing import Any

import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdbento.errors import is_sick
from sdbento.models.device import say_once
from sdbento.settings import Settings

log = logging.getLogger(__name__)

ROWS = 8  # of the calls that are timed: four guided images
TEXT_TOKENS = 77
ROUNDS = 6  # timed calls of each layer and candidate; the first one only warms up
SECONDS = 1.0  # after which no further round begins
MARGIN = 0.03  # by which a candidate must be faster than torch's own choice
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Attention:
    """How a network computes attention. `name` is for people; `order` are SDPA's kernels, the
    preferred one first, or nothing where torch or xformers chooses."""

    name: str
    order: tuple[SDPBackend, ...] = ()


SDPA = Attention("SDPA")
XFORMERS = Attention("xformers")
_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# All are allowed behind the preferred one, since none of them can compute everything.
_PREFERRED = tuple(
    Attention(f"SDPA ({name})", tuple(dict.fromkeys([first, *_KERNELS.values(), SDPBackend.MATH])))
    for name, first in _KERNELS.items()
)


@dataclass(frozen=True)
class Layer:
    """What the time of an attention layer depends on; `text_width` is None where the tokens of the
    image attend to each other."""

    width: int
    heads: int
    text_width: int | None
    tokens: int  # of the image


Layers = Mapping[Layer, Sequence[Any]]  # the layers (diffusers' Attention) that are alike

_chosen: dict[tuple[object, ...], Attention] = {}
# torch keeps the order of SDPA's kernels for the whole process. Whoever sets it holds this lock:
# the engine's thread while it queues a call, or the loader's while it times one.
_order = threading.RLock()


@contextmanager
def using(attention: Attention) -> Iterator[None]:
    """Within this context, this thread's calls of SDPA prefer the kernels of `attention`."""
    order = list(attention.order)
    with _order, sdpa_kernel(order, set_priority=True) if order else nullcontext():
        yield


def fit(network: Any, settings: Settings, latent_pixels: int) -> Attention:
    """Let `network`, on its device, compute with the fastest attention; returns which that is.

    `latent_pixels`: height times width of the latents that it is most often called with. Calls of
    the network must be made within `using(...)` of the result.
    """
    attention = SDPA
    if network.device.type == "cuda":
        layers = _layers(network, latent_pixels)
        attention = fastest(layers, settings, network.device, network.dtype)
    network.set_attn_processor(_processor(attention))
    return attention


def typical_layers(device: torch.device, dtype: torch.dtype) -> Layers:
    """One layer, of those in which SDXL spends the most time at 1024x1024; its weights are random.

    For a machine that has not loaded any model.
    """
    layer = attention_processor.Attention(640, heads=10, dim_head=64).to(device, dtype)
    return {Layer(640, 10, None, 4096): [layer]}


def fastest(
    layers: Layers, settings: Settings, device: torch.device, dtype: torch.dtype
) -> Attention:
    """The attention with which `layers` take the least time together, on a GPU.

    Layers that are alike are measured once in this process. Raises what a GPU that has failed
    reports.
    """
    candidates = _candidates(settings)
    counts = frozenset((layer, len(alike)) for layer, alike in layers.items())
    key = device, dtype, candidates, counts
    if key not in _chosen:
        times = _measure(layers, candidates, device, dtype)
        if not times:
            return SDPA
        figures = ", ".join(f"{attention.name} {ms:.2f} ms" for attention, ms in times.items())
        log.info("attention of all layers, measured: %s", figures)
        _chosen[key] = min(times, key=lambda a: times[a] * (1 - MARGIN if a is SDPA else 1))
    return _chosen[key]


def _candidates(settings: Settings) -> tuple[Attention, ...]:
    """torch's own choice first. A compiler cannot see into xformers."""
    if not settings.enable_xformers or settings.compile:
        return SDPA, *_PREFERRED
    if importlib.util.find_spec("xformers") is None:
        say_once("xformers is not installed: using torch's own attention (SDPA)")
        return SDPA, *_PREFERRED
    return SDPA, *_PREFERRED, XFORMERS


def _processor(attention: Attention) -> Any:
    return XFormersAttnProcessor() if attention is XFORMERS else AttnProcessor2_0()


def _layers(network: Any, latent_pixels: int) -> Layers:
    """The attention layers of a UNet or ControlNet."""
    depth = len(network.down_blocks) - 1
    layers: dict[Layer, list[Any]] = {}
    for name, module in network.named_modules():
        if isinstance(module, attention_processor.Attention):
            text_width = module.cross_attention_dim if module.is_cross_attention else None
            tokens = latent_pixels // 4 ** _level(name, depth)
            layer = Layer(module.query_dim, module.heads, text_width, tokens)
            layers.setdefault(layer, []).append(module)
    return layers


def _level(name: str, depth: int) -> int:
    """How often the latents have been halved where the module of that name stands."""
    if (match := _BLOCK.match(name)) is None:
        return depth
    return int(match[2]) if match[1] == "down" else depth - int(match[2])


@torch.inference_mode()  # as in a step, and code compiled for the one does not fit the other
def _measure(
    layers: Layers, candidates: Iterable[Attention], device: torch.device, dtype: torch.dtype
) -> dict[Attention, float]:
    """Milliseconds of all layers together, by candidate; those that fail are left out.

    They take turns, and each call counts with the shortest of its times, because the GPU may be
    computing steps meanwhile.
    """
    calls = [_call(layer, alike[0], device, dtype) for layer, alike in layers.items()]
    counts = [len(alike) for alike in layers.values()]
    best = {candidate: [inf] * len(calls) for candidate in candidates}
    end = time.monotonic() + SECONDS
    for turn in range(ROUNDS):
        if turn > 1 and time.monotonic() > end:
            break
        for attention in [*best]:
            try:
                times = [_time(call, attention) for call in calls]
            except Exception as error:  # a build for another torch or GPU fails in many ways
                if is_sick(error):
                    raise
                say_once(f"attention by {attention.name} does not work here: {error}")
                del best[attention]
                continue
            if turn > 0:  # the first one warms up
                best[attention] = list(map(min, best[attention], times))
    return {attention: sum(map(mul, counts, times)) for attention, times in best.items()}


def _call(
    layer: Layer, module: Any, device: torch.device, dtype: torch.dtype
) -> Callable[[Attention], Any]:
    """Computes one layer on random tokens, by the attention that it is given."""

    def random(tokens: int, width: int) -> torch.Tensor:
        return torch.randn(ROWS, tokens, width, device=device, dtype=dtype)

    image = random(layer.tokens, layer.width)
    text = None if layer.text_width is None else random(TEXT_TOKENS, layer.text_width)
    return lambda attention: _processor(attention)(module, image, encoder_hidden_states=text)


@torch.inference_mode()
def _time(call: Callable[[Attention], Any], attention: Attention) -> float:
    """Milliseconds that the GPU takes for a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with _order, using(attention):
        start.record()
        call(attention)
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
