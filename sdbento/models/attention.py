"""Which attention a UNet or ControlNet computes with: xformers, or torch's own (SDPA)."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

from sdbento.models.device import say_once
from sdbento.settings import Settings


def set_attention(network: Any, settings: Settings, device: torch.device) -> str:
    """Choose xformers where it is wanted and works, or else SDPA; returns the choice's name."""
    if settings.enable_xformers and _xformers_works(device):
        network.set_attn_processor(XFormersAttnProcessor())
        return "xformers"
    network.set_attn_processor(AttnProcessor2_0())
    return "SDPA"


@cache
def _xformers_works(device: torch.device) -> bool:
    if device.type != "cuda":
        say_once("ENABLE_XFORMERS needs a GPU: using torch's own attention (SDPA)")
        return False
    if importlib.util.find_spec("xformers") is None:
        say_once("xformers is not installed: using torch's own attention (SDPA)")
        return False
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.randn(1, 16, 1, 64, device=device, dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except Exception as exc:  # a build for another torch or GPU fails in many ways
        say_once(f"xformers does not work here ({exc}): using torch's own attention (SDPA)")
        return False
    return True
