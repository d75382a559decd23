"""Small LoRA files for the tiny pipelines, in every format that is read.

A LoRA is random matrices for some layers of some networks; `save_*` write the same matrices with
the names that kohya's trainer, diffusers (old) and PEFT give them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sdbento.environment import load_settings
from sdbento.lora.cache import AdapterCache
from sdbento.lora.hooks import Adapter, WeightedAdapter, _Hook
from sdbento.lora.lookup import LoraSource, locate
from sdbento.models.pipeline import Pipeline
from tests.support.checkpoints import _unet as original_layout
from tests.support.tiny import tiny_pipeline

ATTENTION = ("attn1.", "attn2.", "ff.net", "proj_in", "proj_out")
CONV = ("conv", "time_emb", "add_embedding")
TEXT = ("_proj", "mlp.fc", "text_projection")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

Layers = Mapping[str, Mapping[str, "Matrices"]]


@dataclass(frozen=True)
class Matrices:
    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None


def make_lora(
    family: str,
    seed: int = 0,
    *,
    marks: Mapping[str, tuple[str, ...]] | None = None,
    rank: int = 3,
    alpha: float | None = 2.0,
    strength: float = 0.2,
) -> Layers:
    """Random matrices for the layers whose names contain one of the marks of their network."""
    if marks is None:
        marks = {"unet": ATTENTION}
    generator = torch.Generator().manual_seed(seed)
    pipe = tiny_pipeline(family)
    return {
        part: {
            name: _matrices(layer, rank, alpha, strength, generator)
            for name, layer in getattr(pipe, part).named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and any(mark in name for mark in wanted)
        }
        for part, wanted in marks.items()
        if hasattr(pipe, part)
    }


def everything(family: str) -> dict[str, tuple[str, ...]]:
    """Marks of all layers that can have a LoRA."""
    encoders = TEXT_ENCODERS if family == "sdxl" else TEXT_ENCODERS[:1]
    return {"unet": (*ATTENTION, *CONV), **dict.fromkeys(encoders, TEXT)}


def save_kohya(family: str, layers: Layers, path: Path, **metadata: str) -> Path:
    """`lora_unet_..._to_q.lora_down.weight`; XL's UNet has its original layout's names."""
    return _save(_with_alphas(layers, partial(_kohya_name, family)), path, metadata)


def save_diffusers_old(family: str, layers: Layers, path: Path, **metadata: str) -> Path:
    """`unet....attn1.processor.to_q_lora.down.weight`: the names of 2023, without alphas."""
    return _save(_paired(layers, _old_name), path, metadata)


def save_diffusers(family: str, layers: Layers, path: Path, **metadata: str) -> Path:
    """`unet....attn1.to_q.lora.down.weight`, as Stable Diffusion's training scripts write it."""
    return _save(_paired(layers, _diffusers_name), path, metadata)


def save_peft(family: str, layers: Layers, path: Path, **metadata: str) -> Path:
    """`unet....attn1.to_q.lora_A.weight`, with the alphas in the metadata where there are any."""
    config: dict[str, Any] = {}
    for part, matrices in layers.items():
        alphas = {name: m.alpha for name, m in matrices.items() if m.alpha is not None}
        if alphas:
            first = next(iter(alphas.values()))
            config[f"{part}.r"] = len(next(iter(matrices.values())).down)
            config[f"{part}.lora_alpha"] = first
            config[f"{part}.alpha_pattern"] = {k: a for k, a in alphas.items() if a != first}
            config[f"{part}.target_modules"] = list(matrices)
    if config:
        metadata = {"lora_adapter_metadata": json.dumps(config), **metadata}
    return _save(_paired(layers, _peft_name), path, metadata)


def save_comfyui(family: str, layers: Layers, path: Path, **metadata: str) -> Path:
    """`diffusion_model....attn1.to_q.lora_up.weight`, in the original layout's names."""
    return _save(_with_alphas(layers, partial(_comfyui_name, family)), path, metadata)


def styled(family: str, folder: Path, **options: Any) -> dict[str, Any]:
    """A random LoRA in `folder`, and what a request for it needs. `options` are make_lora's."""
    save_peft(family, make_lora(family, **options), folder / "style.safetensors")
    return {"settings": load_settings(lora_dir=folder), "lora": {"model_id": "style"}}


def save_peft_alone(layers: Layers, path: Path) -> Path:
    """`base_model.model....to_q.lora_A.weight`: one network, as PEFT itself saves it."""
    [(part, matrices)] = layers.items()
    tensors = {
        f"base_model.model.{_peft_name(part, name, direction)}": getattr(low_rank, direction)
        for name, low_rank in matrices.items()
        for direction in ("down", "up")
    }
    return _save(tensors, path, {})


WRITERS: dict[str, Callable[..., Path]] = {
    "kohya": save_kohya,
    "diffusers-old": save_diffusers_old,
    "diffusers": save_diffusers,
    "peft": save_peft,
}


def merged(pipe: Any, layers: Layers, weight: float = 1.0) -> Any:
    """Adds the LoRA to the weights of `pipe` itself: the reference, without hooks or PEFT."""
    for part, matrices in layers.items():
        modules = dict(getattr(pipe, part).named_modules())
        for name, m in matrices.items():
            scale = weight * (1.0 if m.alpha is None else m.alpha / len(m.down))
            change = (m.up.flatten(1) @ m.down.flatten(1)).reshape(modules[name].weight.shape)
            modules[name].weight.data += scale * change
    return pipe


def _matrices(
    layer: nn.Module, rank: int, alpha: float | None, strength: float, generator: torch.Generator
) -> Matrices:
    if isinstance(layer, nn.Conv2d):
        down: tuple[int, ...] = (rank, layer.in_channels, *layer.kernel_size)
        up: tuple[int, ...] = (layer.out_channels, rank, 1, 1)
    else:
        assert isinstance(layer, nn.Linear)
        down, up = (rank, layer.in_features), (layer.out_features, rank)
    return Matrices(
        strength * torch.randn(down, generator=generator),
        strength * torch.randn(up, generator=generator),
        alpha,
    )


@cache
def _original_names(family: str) -> dict[str, str]:
    """The original layout's names of the UNet's layers, by diffusers' names."""
    unet = tiny_pipeline(family).unet
    keys = {tensor.data_ptr(): key for key, tensor in original_layout(unet).items()}
    return {
        key.removesuffix(".weight"): keys[tensor.data_ptr()].removesuffix(".weight")
        for key, tensor in unet.state_dict().items()
    }


def _kohya_name(family: str, part: str, name: str) -> str:
    if part == "unet":
        name = _original_names(family)[name] if family == "sdxl" else name
        return "lora_unet_" + name.replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_"}
    return prefix.get(part, "lora_te2_") + _clip_name(name).replace(".", "_")


def _comfyui_name(family: str, part: str, name: str) -> str:
    if part == "unet":
        return "diffusion_model." + _original_names(family)[name]
    encoder = "clip_g" if part == "text_encoder_2" else "clip_l"
    return f"text_encoders.{encoder}.transformer.{_clip_name(name)}"


def _clip_name(name: str) -> str:
    """The name of an encoder layer before transformers dropped a level of its module names."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def _with_alphas(layers: Layers, named: Callable[[str, str], str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for part, matrices in layers.items():
        for name, low_rank in matrices.items():
            key = named(part, name)
            tensors[f"{key}.lora_down.weight"] = low_rank.down
            tensors[f"{key}.lora_up.weight"] = low_rank.up
            if low_rank.alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(low_rank.alpha)
    return tensors


def _paired(layers: Layers, named: Callable[[str, str, str], str]) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{named(part, name, direction)}": getattr(matrices, direction)
        for part, named_matrices in layers.items()
        for name, matrices in named_matrices.items()
        for direction in ("down", "up")
    }


def _old_name(part: str, name: str, direction: str) -> str:
    if part != "unet" or ".attn" not in name:
        return _diffusers_name(part, name, direction)
    block, _, layer = name.removesuffix(".0").rpartition(".")
    return f"{block}.processor.{layer}_lora.{direction}.weight"


def _diffusers_name(part: str, name: str, direction: str) -> str:
    if part == "unet":
        return f"{name}.lora.{direction}.weight"
    return f"{_clip_name(name)}.lora_linear_layer.{direction}.weight"


def _peft_name(part: str, name: str, direction: str) -> str:
    name = name if part == "unet" else _clip_name(name)
    return f"{name}.lora_{'A' if direction == 'down' else 'B'}.weight"


def _save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata=dict(metadata))
    return path


class NamedAdapters(AdapterCache):
    """Also takes the name of a LoRA, as requests do."""

    def get(self, pipeline: Pipeline, source: LoraSource | str) -> Adapter:
        if isinstance(source, str):
            source = locate(source, self._settings)
        return super().get(pipeline, source)


def cache_of(folder: Path, **settings: Any) -> NamedAdapters:
    return NamedAdapters(load_settings(lora_dir=folder, **settings))


def num_hooks(module: nn.Module) -> int:
    """The number of this project's hooks: transformers has some of its own on its modules."""
    hooks = [hook for child in module.modules() for hook in child._forward_hooks.values()]
    return sum(isinstance(hook, _Hook) for hook in hooks)


def on(adapter: Adapter, weight: float = 1.0, text_encoder_weight: float = 1.0) -> WeightedAdapter:
    return WeightedAdapter(adapter, weight, text_encoder_weight)
