"""Tiny pipelines as single files in the original layout, as A1111 and Civitai have them.

The inverse of diffusers' own conversion (loaders/single_file_utils.py), for the shapes that
`tests.support.tiny` has; also headers alone, for tests that read only the header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.tiny import tiny_pipeline

Tensors = dict[str, torch.Tensor]

# Shapes of the tensors by which a single file is known.
UNET_PREFIX = "model.diffusion_model."
SD15 = {
    UNET_PREFIX + "input_blocks.0.0.weight": (320, 4, 3, 3),
    UNET_PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
}
SD21 = {
    **SD15,
    UNET_PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
}
SDXL = {
    UNET_PREFIX + "input_blocks.0.0.weight": (320, 4, 3, 3),
    UNET_PREFIX + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    UNET_PREFIX + "label_emb.0.0.weight": (1280, 2816),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (768,),
}
LAST_NORM = UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "text_model.": "",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}


def save_tiny_checkpoint(kind: str, path: Path, seed: int = 0) -> Path:
    """The tiny pipeline's weights as one .safetensors file; returns `path`."""
    pipe = tiny_pipeline(kind, seed)
    family = kind.partition("-")[0]
    tensors = {
        **_prefixed("model.diffusion_model.", _unet(pipe.unet)),
        **_prefixed("first_stage_model.", _vae(pipe.vae)),
    }
    if family == "sdxl":
        tensors |= _prefixed("conditioner.embedders.0.transformer.", _clip(pipe.text_encoder))
        tensors |= _prefixed("conditioner.embedders.1.model.", _open_clip(pipe.text_encoder_2))
    elif family == "sd21":
        tensors |= _prefixed("cond_stage_model.model.", _open_clip(pipe.text_encoder))
    else:
        tensors |= _prefixed("cond_stage_model.transformer.", _clip(pipe.text_encoder))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def save_zeros(
    path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file of zeros in fp16."""
    tensors = {key: torch.zeros(tuple(shape), dtype=torch.float16) for key, shape in shapes.items()}
    save_file(tensors, path, dict(metadata or {}))
    return path


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for ours, original in names.items():
        key = key.replace(ours, original)
    return key


def _unet(unet: Any) -> Tensors:
    layers = int(unet.config.layers_per_block)
    names: dict[str, str] = dict(UNET)
    for i in range(len(unet.config.down_block_types)):
        first = (layers + 1) * i + 1
        for j in range(layers):
            names[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{first + j}.0."
            names[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{first + j}.1."
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for i, kind in enumerate(unet.config.up_block_types):
        first = (layers + 1) * i
        for j in range(layers + 1):
            names[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{first + j}.0."
            names[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{first + j}.1."
        place = 2 if kind.startswith("CrossAttn") else 1
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{first + layers}.{place}"
    return {
        _renamed(key, names | RESNET if "resnets" in key else names): tensor
        for key, tensor in unet.state_dict().items()
    }


def _vae(vae: Any) -> Tensors:
    last = len(vae.config.block_out_channels) - 1
    names: dict[str, str] = dict(VAE)
    for i in range(last + 1):
        names[f"down_blocks.{i}.resnets."] = f"down.{i}.block."
        names[f"down_blocks.{i}.downsamplers.0"] = f"down.{i}.downsample"
        names[f"up_blocks.{i}.resnets."] = f"up.{last - i}.block."
        names[f"up_blocks.{i}.upsamplers.0"] = f"up.{last - i}.upsample"
    tensors = {_renamed(key, names): tensor for key, tensor in vae.state_dict().items()}
    attention = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {
        key: tensor[:, :, None, None] if attention.search(key) else tensor
        for key, tensor in tensors.items()
    }


def _clip(encoder: Any) -> Tensors:
    return {
        f"text_model.{key.removeprefix('text_model.')}": tensor
        for key, tensor in encoder.state_dict().items()
    }


def _open_clip(encoder: Any) -> Tensors:
    tensors = {_renamed(key, OPEN_CLIP): tensor for key, tensor in encoder.state_dict().items()}
    if "text_projection" in tensors:
        tensors["text_projection"] = tensors["text_projection"].T
    for key in [key for key in tensors if ".self_attn.q_proj." in key]:
        parts = [tensors.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        merged = re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", key)
        tensors[merged] = torch.cat(parts)
    return tensors
