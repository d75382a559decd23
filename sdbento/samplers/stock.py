"""Which stock pipeline does a task, and how its constructor changes a scheduler's configuration.

Some constructors overrule the configuration of the scheduler they are given, for the sake of old
repositories: `StableDiffusionInpaintPipeline` runs every PNDM scheduler as PLMS, while the
ControlNet pipelines change no scheduler. An image equals the stock pipeline's only if its sampler
is compiled from the configuration that the constructor leaves.

Knows nothing of requests, and makes no scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# All that the constructors of diffusers 0.42 change; tests/samplers/test_stock.py compares.
_FORCED: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}


def pipeline_class(*, is_sdxl: bool, image: bool, inpaint: bool, controlnet: bool) -> str:
    """The name of the diffusers pipeline for a task. `inpaint`: there is a mask, or the UNet reads
    a mask, and without one everything is repainted."""
    task = "Inpaint" if inpaint else "Img2Img" if image else ""
    family, network = "XL" if is_sdxl else "", "ControlNet" if controlnet else ""
    return f"StableDiffusion{family}{network}{task}Pipeline"


def scheduler_config(pipeline_class: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, the model's own, as that pipeline's constructor leaves it.

    May have options that the scheduler's class does not know; `from_config` ignores those.
    """
    forced = _FORCED.get(pipeline_class, {})
    by_default = set(config.get("_use_default_values", ())) - forced.keys()
    return {**config, **forced, "_use_default_values": sorted(by_default)}
