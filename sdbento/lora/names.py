"""The names that PEFT and ComfyUI give a LoRA's tensors, as names that diffusers' conversions read.

Knows nothing of what is in the tensors, nor whether a model has such layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

PEFT = "base_model.model."  # its own save_pretrained, for any model that it wraps
COMFYUI = "diffusion_model."
# ComfyUI's, and the one that kohya's trainer gives the same network.
_NETWORKS = {
    f"model.{COMFYUI}": "lora_unet_",
    COMFYUI: "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
    "clip_l.transformer.": "lora_te1_",
    "clip_g.transformer.": "lora_te2_",
}
_UPSAMPLER = re.compile(r"^(output_blocks\.\d+)\.1\.conv$")
_ENDINGS = {
    ".lora_A.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_up.weight",
    ".lora.down.weight": ".lora_down.weight",
    ".lora.up.weight": ".lora_up.weight",
}


def translated(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors; other names stay as they are. Raises KeyError if two get the same name."""
    if any(PEFT in key for key in tensors):
        names = {key: _without_peft(key) for key in tensors}
    elif any(key.startswith((COMFYUI, f"model.{COMFYUI}")) for key in tensors):
        names = {key: _kohyas(key) for key in tensors}
    else:
        return dict(tensors)
    if len(set(names.values())) != len(names):
        raise KeyError("two names that mean the same")
    return {names[key]: tensor for key, tensor in tensors.items()}


def _without_peft(key: str) -> str:
    """PEFT wraps one network a file, and does not say which: text encoders name their layers so."""
    part, _, layer = key.partition(PEFT)
    if part:
        return part + layer
    return f"text_encoder.{layer}" if layer.startswith("text_model.") else f"unet.{layer}"


def _kohyas(key: str) -> str:
    prefix = next((prefix for prefix in _NETWORKS if key.startswith(prefix)), None)
    if prefix is None:
        return key
    layer, mark, matrix = key.removeprefix(prefix).partition(".lora")
    if not mark:  # an alpha, or what no LoRA has
        layer, mark, matrix = layer.rpartition(".")
    # The upsampler of a block without attention; diffusers expects one with it.
    layer = _UPSAMPLER.sub(r"\1.2.conv", layer)
    return _NETWORKS[prefix] + layer.replace(".", "_") + _ENDINGS.get(mark + matrix, mark + matrix)
