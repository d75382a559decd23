"""Tiny random pipelines of the three families: the real architectures, a few hundred kB each.

Also their inpainting models (`sd15-inpaint` and so on), `sdxl-refiner`, and ControlNets.

Nothing is downloaded: networks are made from configurations, the tokenizer by code. The VAE shrinks
by 8 as the real ones do, so sizes behave as in reality; widths are as small as the architectures
allow. Every tensor follows from `seed`, and text reaches the image strongly enough to be tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

MAX_TOKENS = 77
NUM_ROWS = 4  # of the batch that `run_unet` takes rows of
HIDDEN, HIDDEN_2 = 32, 48  # of the text encoders; diffusers tells them apart by their widths
TIME_ID_WIDTH = 8
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("a", "t</w>"), ("c", "at</w>"), ("d", "o"), ("do", "g</w>"), ("w", "o"), ("wo", "r")]

CROSS_ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**CROSS_ATTENTION, "attention_head_dim": 2, "cross_attention_dim": HIDDEN},
    "sd21": {
        **CROSS_ATTENTION,
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": HIDDEN,
        "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": HIDDEN + HIDDEN_2,
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": 6 * TIME_ID_WIDTH + HIDDEN_2,
    },
}
UNETS |= {f"{family}-inpaint": {**UNETS[family], "in_channels": 9} for family in [*UNETS]}
UNETS["sdxl-refiner"] = {
    **UNETS["sdxl"],
    "cross_attention_dim": HIDDEN_2,
    "projection_class_embeddings_input_dim": 5 * TIME_ID_WIDTH + HIDDEN_2,
}
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd15": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "sd21": (
        DDIMScheduler,
        {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    ),
    "sdxl": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
}


@cache
def tiny_pipeline(kind: str, seed: int = 0) -> Any:
    """A stock diffusers pipeline, fp32, in evaluation mode; made once a process and shared.

    `kind`: a family, or one with `-inpaint`, or `sdxl-refiner`. All but the refiner are of the
    text-to-image class.
    """
    family = kind.partition("-")[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = {"unet": _unet(kind), "vae": _vae(), "scheduler": _scheduler(family)}
        if kind != "sdxl-refiner":
            components["tokenizer"] = _tokenizer("!" if family == "sd21" else END)
            components["text_encoder"] = _text_encoder("quick_gelu" if family != "sd21" else "gelu")
        if family == "sdxl":
            components["tokenizer_2"] = _tokenizer("!")
            components["text_encoder_2"] = _text_encoder(
                "gelu", CLIPTextModelWithProjection, HIDDEN_2
            )
        for component in components.values():
            if isinstance(component, torch.nn.Module):
                _strengthen(component)
                component.eval().requires_grad_(False)
    if kind == "sdxl-refiner":
        components |= {"tokenizer": None, "text_encoder": None}
        return StableDiffusionXLImg2ImgPipeline(
            **components, requires_aesthetics_score=True, add_watermarker=False
        )
    if family == "sdxl":
        return StableDiffusionXLPipeline(**components, add_watermarker=False)
    return StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@cache
def tiny_controlnet(family: str, seed: int = 0) -> Any:
    """A ControlNet for the tiny pipeline of that family and seed, with an effect of its own."""
    unet = tiny_pipeline(family, seed).unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
        zeros = [*network.controlnet_down_blocks, network.controlnet_mid_block]
        for convolution in (*zeros, network.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(convolution.weight, std=0.1)
            torch.nn.init.normal_(convolution.bias, std=0.1)
    return network.eval().requires_grad_(False)


def save_tiny(kind: str, folder: Path, seed: int = 0, variant: str | None = None) -> Path:
    """Write the pipeline as a diffusers folder with safetensors; returns `folder`.

    Inpainting models are saved with the class name that their repositories have.
    """
    pipe = tiny_pipeline(kind, seed)
    if kind == "sdxl-inpaint":
        pipe = StableDiffusionXLInpaintPipeline(**pipe.components, add_watermarker=False)
    elif kind.endswith("-inpaint"):
        pipe = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True, variant=variant)
    return folder


def save_tiny_controlnet(
    family: str, folder: Path, seed: int = 0, variant: str | None = None
) -> Path:
    tiny_controlnet(family, seed).save_pretrained(folder, safe_serialization=True, variant=variant)
    return folder


def run_unet(
    unet: Any, rows: Sequence[int] = range(NUM_ROWS), size: tuple[int, int] = (8, 8)
) -> Tensor:
    """The UNet's output for some of the rows of one fixed batch; `size` is that of the latents."""
    generator, config = torch.Generator().manual_seed(5), unet.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(NUM_ROWS, *shape, generator=generator)[list(rows)]

    latents, text = noise(config.in_channels, *size), noise(MAX_TOKENS, config.cross_attention_dim)
    conditions = None
    if config.addition_embed_type == "text_time":
        num_time_ids = (config.projection_class_embeddings_input_dim - HIDDEN_2) // TIME_ID_WIDTH
        conditions = {"text_embeds": noise(HIDDEN_2), "time_ids": noise(num_time_ids)}
    timesteps = torch.tensor([981, 501, 21, 1])[list(rows)]
    with torch.no_grad():
        output = unet(latents, timesteps, text, added_cond_kwargs=conditions)
    sample: Tensor = output.sample
    return sample


def _unet(kind: str) -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **UNETS[kind],
    )


def _vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def _scheduler(family: str) -> Any:
    """The scheduler of the family's repository, built as a loaded one, which states its class."""
    kind, options = SCHEDULERS[family]
    return kind.from_config({**NOISE, **options, "_class_name": kind.__name__})


def _tokenizer(pad_token: str) -> Any:
    """CLIP's byte-level tokenizer: all bytes, alone and ending a word, and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += [*(left + right for left, right in MERGES), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocab, merges=MERGES, pad_token=pad_token, model_max_length=MAX_TOKENS
    )


def _text_encoder(activation: str, kind: Any = CLIPTextModel, hidden: int = HIDDEN) -> Any:
    vocab_size = 2 * 256 + len(MERGES) + 2
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return kind(config)


def _strengthen(module: torch.nn.Module) -> None:
    """Scale up what random initialisation dampens, so that every input changes the output."""
    for name, parameter in module.named_parameters():
        if "embedding" in name and "time" not in name:
            parameter.data *= 10
        elif name.endswith("final_layer_norm.bias"):
            parameter.data += 0.1  # a mean to keep, as trained text encoders have
        elif parameter.dim() > 1:
            parameter.data *= 1.5
