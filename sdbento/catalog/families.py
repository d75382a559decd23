"""Which Stable Diffusion a model is, told from its configurations or its safetensors header.

Three families are served. Everything else, from pickled weights to other architectures, is refused
with UnsupportedModel and the reason. Reads no weights; knows nothing of names or of the Hub.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdbento.errors import UnsupportedModel

PredictionType = Literal["epsilon", "v_prediction"]
Kind = Literal["model", "ControlNet"]
Header = Mapping[str, Mapping[str, Any]]

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
PICKLED = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
VAE_FACTOR = 8
LATENT_CHANNELS = 4
INPAINT_CHANNELS = 2 * LATENT_CHANNELS + 1  # latents, mask, latents of the masked picture


class Family(StrEnum):
    SD15 = "sd15"
    SD21 = "sd21"
    SDXL = "sdxl"


@dataclass(frozen=True)
class Traits:
    """What a model's files tell of it. `prediction_type` None: as its scheduler's configuration."""

    family: Family
    side: int  # pixels of the native square
    prediction_type: PredictionType | None = None
    zero_snr: bool = False  # trained down to pure noise (Lin et al. 2023)
    num_parameters: int | None = None
    inpaints: bool = False  # its UNet also reads the mask and the masked picture
    refines: bool = False  # the SDXL refiner: one text encoder, and an aesthetic score


# The classes that a pipeline may be made of: what is not listed could be code of its own.
_Classes = Mapping[str, set[tuple[str, str]]]
_TOKENIZER = {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")}
_NETWORKS: _Classes = {
    "unet": {("diffusers", "UNet2DConditionModel")},
    "vae": {("diffusers", "AutoencoderKL")},
}
_TEXT: _Classes = {
    "text_encoder": {("transformers", "CLIPTextModel")},
    "tokenizer": _TOKENIZER,
}
_TEXT_2: _Classes = {
    "text_encoder_2": {("transformers", "CLIPTextModelWithProjection")},
    "tokenizer_2": _TOKENIZER,
}
_TASKS = ("", "Img2Img", "Inpaint")  # which one an index names depends on who saved it
_PIPELINES: dict[str, _Classes] = {
    **{f"StableDiffusion{task}Pipeline": {**_NETWORKS, **_TEXT} for task in _TASKS},
    **{f"StableDiffusionXL{task}Pipeline": {**_NETWORKS, **_TEXT, **_TEXT_2} for task in _TASKS},
}
_REFINER: _Classes = {**_NETWORKS, **_TEXT_2}


def from_configs(name: str, index: Mapping[str, Any], unet: Mapping[str, Any]) -> Traits:
    """Traits from `model_index.json` and `unet/config.json`. Raises UnsupportedModel."""
    pipeline = str(index.get("_class_name"))
    if pipeline not in _PIPELINES:
        raise refusal(name, f"it is a {pipeline}, not a Stable Diffusion 1.x, 2.x or XL pipeline")
    is_sdxl = "XL" in pipeline
    refines = is_sdxl and bool(index.get("requires_aesthetics_score"))
    for component, classes in (_REFINER if refines else _PIPELINES[pipeline]).items():
        given = [str(part) for part in index.get(component) or () if part]
        if tuple(given) not in classes:
            raise refusal(name, f"its {component} is {'.'.join(given) or 'missing'}")
    if refines and any(index.get("text_encoder") or ()):
        raise refusal(name, "it takes an aesthetic score but is not the SDXL refiner")
    if "diffusers" not in (index.get("scheduler") or ()):
        raise refusal(name, "its scheduler is not one of diffusers")
    inpaints = _inpaints(name, unet.get("in_channels", LATENT_CHANNELS))
    if unet.get("addition_embed_type") != ("text_time" if is_sdxl else None):
        raise refusal(name, "its UNet takes conditions that Stable Diffusion does not have")
    if unet.get("time_cond_proj_dim") or unet.get("class_embed_type"):
        raise refusal(name, "its UNet takes guidance or classes as an input")
    side = VAE_FACTOR * _side(unet.get("sample_size"))
    return Traits(_family(unet), side, inpaints=inpaints, refines=refines)


def _family(network: Mapping[str, Any]) -> Family:
    """Of a UNet or a ControlNet, from its configuration."""
    if network.get("addition_embed_type") == "text_time":
        return Family.SDXL
    return Family.SD21 if network.get("use_linear_projection") else Family.SD15


def _side(sample_size: Any) -> int:
    return int(sample_size[0] if isinstance(sample_size, list) else sample_size or 64)


_UNET = "model.diffusion_model."
_INPUT = _UNET + "input_blocks.0.0.weight"
_SDXL_LABELS = _UNET + "label_emb.0.0.weight"
_TEXT_KEYS = (  # the first cross-attention, which lies deeper in SDXL
    _UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    _UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
)
_LAST_NORM = _UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
# The width of the text embeddings that the cross-attention of a family's UNet reads.
FAMILY_BY_TEXT_WIDTH = {768: Family.SD15, 1024: Family.SD21, 2048: Family.SDXL}
_TEXT_WIDTHS = {family: width for width, family in FAMILY_BY_TEXT_WIDTH.items()}
_REFINER_TEXT_WIDTH = 1280


def from_checkpoint(name: str, path: Path) -> Traits:
    """Traits of a single .safetensors file in the original layout (A1111, Civitai).

    Reads the header, and of SD 2.x one small tensor. Raises UnsupportedModel.
    """
    header = read_header(name, path)
    if _INPUT not in header:
        raise refusal(name, "the file has no Stable Diffusion UNet in the original layout")
    inpaints = _inpaints(name, header[_INPUT]["shape"][1])
    width = next((header[key]["shape"][1] for key in _TEXT_KEYS if key in header), None)
    if width == _REFINER_TEXT_WIDTH:
        raise refusal(name, "it is the SDXL refiner, which is read from a diffusers folder only")
    family = FAMILY_BY_TEXT_WIDTH.get(width or 0)
    if family is None or (family is Family.SDXL) != (_SDXL_LABELS in header):
        raise refusal(name, "its UNet is none of Stable Diffusion 1.x, 2.x or XL base")
    for part, prefixes in _PARTS.items():
        if not any(key.startswith(prefixes) for key in header):
            raise refusal(name, f"the file has no {part}")
    prediction_type = _prediction_type(header, path, family)
    return Traits(
        family,
        _native_side(family, prediction_type),
        prediction_type,
        zero_snr="ztsnr" in header,
        num_parameters=count_parameters(header),
        inpaints=inpaints,
    )


_PARTS = {
    "VAE": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}


def count_parameters(header: Header) -> int:
    tensors = (entry for key, entry in header.items() if key != "__metadata__")
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


def _prediction_type(header: Header, path: Path, family: Family) -> PredictionType:
    """What the file says of itself, by ModelSpec's or ComfyUI's marks; else, for 2.x, its weights.

    The last norm's bias spreads wider under v-prediction: ComfyUI's test (model_base, SD20).
    """
    stated = str(header.get("__metadata__", {}).get("modelspec.prediction_type", "")).lower()
    if stated in ("v", "v_prediction", "epsilon"):
        return "epsilon" if stated == "epsilon" else "v_prediction"
    if "v_pred" in header:
        return "v_prediction"
    if family is Family.SD21 and _LAST_NORM in header:
        spread = float(_read_tensor(path, header[_LAST_NORM]).std())
        return "v_prediction" if spread > 0.09 else "epsilon"
    return "epsilon"


def _native_side(family: Family, prediction_type: PredictionType) -> int:
    if family is Family.SDXL:
        return 1024
    return 768 if family is Family.SD21 and prediction_type == "v_prediction" else 512


def read_header(name: str, path: Path) -> Header:
    """The names, types, shapes and offsets of a safetensors file, and its `__metadata__`."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError
            header: dict[str, Any] = json.loads(file.read(length))
        for key, entry in header.items():
            if key != "__metadata__" and not {"dtype", "shape", "data_offsets"} <= entry.keys():
                raise ValueError
    except (struct.error, ValueError, AttributeError):
        raise refusal(name, "it is no safetensors file") from None
    return header


def _read_tensor(path: Path, entry: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One tensor as float32. numpy has no bfloat16, which is the upper half of a float32."""
    start, end = entry["data_offsets"]
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length + start)
        data = file.read(end - start)
    if entry["dtype"] == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[entry["dtype"]]).astype(np.float32)


def _inpaints(name: str, in_channels: int) -> bool:
    if in_channels not in (LATENT_CHANNELS, INPAINT_CHANNELS):
        raise refusal(
            name,
            f"its UNet has {in_channels} input channels; {LATENT_CHANNELS}, and for inpainting "
            f"{INPAINT_CHANNELS}, are supported",
        )
    return in_channels == INPAINT_CHANNELS


def controlnet_family(name: str, config: Mapping[str, Any]) -> Family:
    """The family of a ControlNet, from its `config.json`. Raises UnsupportedModel."""
    kind = config.get("_class_name")
    if kind != "ControlNetModel":
        raise refusal(name, f"it is a {kind}, not a ControlNetModel", "ControlNet")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise refusal(name, "it takes conditions that Stable Diffusion does not have", "ControlNet")
    if config.get("class_embed_type") or config.get("global_pool_conditions"):
        raise refusal(name, "it takes classes, or pools its residuals", "ControlNet")
    if config.get("in_channels", LATENT_CHANNELS) != LATENT_CHANNELS:
        raise refusal(name, "it reads other latents than Stable Diffusion's", "ControlNet")
    if config.get("conditioning_channels", 3) != 3:
        raise refusal(name, "its control image has other channels than RGB", "ControlNet")
    return _family(config)


def misfit(
    family: Family, unet: Mapping[str, Any] | None, controlnet: Mapping[str, Any] | None
) -> str | None:
    """How a ControlNet of the right family differs from a UNet, in words; None where it fits.

    Configurations; None stands for one of the family's usual widths.
    """
    ours, theirs = (config or _usual(family) for config in (unet, controlnet))
    for field in ("cross_attention_dim", "block_out_channels"):
        if field in ours and field in theirs and ours[field] != theirs[field]:
            return f"its {field} is {theirs[field]}, not {ours[field]}"
    return None


def _usual(family: Family) -> Mapping[str, Any]:
    return {"cross_attention_dim": _TEXT_WIDTHS[family]}


def refuse_pickles(name: str, kind: Kind = "model") -> None:
    if name.lower().endswith(PICKLED):
        reason = "pickled weights can run code when loaded; only safetensors are read"
        raise refusal(name, reason, kind)


def refusal(name: str, reason: str, kind: Kind = "model") -> UnsupportedModel:
    param = "model" if kind == "model" else "controlnet.type"
    return UnsupportedModel(f"{kind} {name} is not supported: {reason}", param=param)
