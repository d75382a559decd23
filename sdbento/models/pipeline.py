"""A model or ControlNet in memory, ready to use.

Knows nothing of how it was loaded or of who uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sdbento.catalog.families import INPAINT_CHANNELS, Family
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.models.acceleration.attention import SDPA, Attention
from sdbento.models.acceleration.torch_compile import CompiledUnet


@dataclass(eq=False)
class Pipeline:
    """A resident model: the stock pipeline's components, ready on `device`.

    `pipe` is the stock text-to-image pipeline, whichever one saved the model and also where the
    UNet is one for inpainting. Only of the SDXL refiner, which needs an image to start from, it is
    the image-to-image pipeline.
    """

    spec: ModelSpec
    pipe: Any = field(repr=False)  # StableDiffusion[XL][Img2Img]Pipeline
    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    nbytes: int
    attention: Attention = SDPA
    compiled: CompiledUnet | None = field(default=None, repr=False)
    preview_decoder: Any | None = field(default=None, repr=False)  # AutoencoderTiny

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def vae(self) -> Any:
        return self.pipe.vae

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """With the class's name, which only schedulers that were loaded from files have in it."""
        scheduler = self.pipe.scheduler
        return {**scheduler.config, "_class_name": type(scheduler).__name__}

    @property
    def is_sdxl(self) -> bool:
        return self.spec.family is Family.SDXL

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def inpaints(self) -> bool:
        """Whether the UNet also reads the mask and the masked image."""
        return bool(self.unet.config.in_channels == INPAINT_CHANNELS)

    @property
    def requires_aesthetics_score(self) -> bool:
        """Whether the UNet reads an aesthetic score in place of a target size (SDXL refiner)."""
        return bool(self.pipe.config.get("requires_aesthetics_score", False))


@dataclass(eq=False)
class ControlNet:
    """A resident ControlNet, ready on `device`."""

    spec: ControlNetSpec
    module: Any = field(repr=False)  # ControlNetModel
    device: torch.device
    dtype: torch.dtype
    nbytes: int
    attention: Attention = SDPA


Resident = Pipeline | ControlNet


def networks(resident: Resident) -> Iterator[torch.nn.Module]:
    """All of its torch modules."""
    if isinstance(resident, ControlNet):
        yield resident.module
        return
    yield from modules(resident.pipe, resident.preview_decoder)


def modules(pipe: Any, preview_decoder: Any | None = None) -> Iterator[torch.nn.Module]:
    """The networks of a stock pipeline, and the decoder of its previews if there is one."""
    parts = (*pipe.components.values(), preview_decoder)
    return (part for part in parts if isinstance(part, torch.nn.Module))


def num_bytes(parts: Iterable[torch.nn.Module]) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [t for module in parts for t in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
