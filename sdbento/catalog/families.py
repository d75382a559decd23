"""Recognises the family of a Stable Diffusion model by its configurations or safetensors header.

Three families are served. Everything else, from pickled weights to other architectures, is refused
with UnsupportedModel and the reason. Knows nothing of how names are looked up, nor of the Hub.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from sdbento.errors import UnsupportedModel

PredictionType = Literal["epsilon", "v_prediction"]
Kind = Literal["model", "ControlNet"]

PICKLED = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
VAE_FACTOR = 8
LATENT_CHANNELS = 4
MAX_REASON = 300  # characters
MAX_LATENT_SIDE = 1024  # 8192 pixels
MAX_HEADER_BYTES = 25_000_000  # trainers write some MB about their images
INPAINT_CHANNELS = 2 * LATENT_CHANNELS + 1  # latents, mask, latents of the masked image


class Family(StrEnum):
    SD15 = "sd15"
    SD21 = "sd21"
    SDXL = "sdxl"


@dataclass(frozen=True)
class Traits:
    """What a model's files tell of it."""

    family: Family
    side: int  # pixels of the native square
    prediction_type: PredictionType | None = None  # None: as the scheduler's configuration says
    zero_snr: bool = False  # trained down to pure noise (Lin et al. 2023)
    num_parameters: int | None = None
    inpaints: bool = False  # its UNet also reads the mask and the masked image
    refines: bool = False  # the SDXL refiner: one text encoder, and an aesthetic score


# The classes that a pipeline may be made of. Any other could be code that comes with the model.
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
_TASKS = ("", "Img2Img", "Inpaint")  # the index names whichever pipeline saved the model
_PIPELINES: dict[str, _Classes] = {
    **{f"StableDiffusion{task}Pipeline": {**_NETWORKS, **_TEXT} for task in _TASKS},
    **{f"StableDiffusionXL{task}Pipeline": {**_NETWORKS, **_TEXT, **_TEXT_2} for task in _TASKS},
}
_REFINER: _Classes = {**_NETWORKS, **_TEXT_2}


def from_configs(name: str, index: Mapping[str, Any], unet: Mapping[str, Any]) -> Traits:
    """Traits from `model_index.json` and `unet/config.json`. Raises UnsupportedModel."""
    with _refusing(name, "its configurations hold values that no model has"):
        return _from_configs(name, index, unet)


def _from_configs(name: str, index: Mapping[str, Any], unet: Mapping[str, Any]) -> Traits:
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
    side = int(sample_size[0] if isinstance(sample_size, list) else sample_size or 64)
    if not 1 <= side <= MAX_LATENT_SIDE:
        raise ValueError(f"sample_size is {side}")
    return side


_WRONG_VALUES = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)


@contextmanager
def _refusing(name: str, reason: str, kind: Kind = "model") -> Iterator[None]:
    """What is read inside comes with a model, and may hold anything in place of what belongs
    there."""
    try:
        yield
    except UnsupportedModel:
        raise
    except _WRONG_VALUES as error:
        raise refusal(name, reason, kind) from error


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
    with _refusing(name, "its tensors have shapes that no model has"):
        return _from_header(name, path, header)


def _from_header(name: str, path: Path, header: Header) -> Traits:
    shapes = header.shapes
    if _INPUT not in shapes:
        raise refusal(name, "the file has no Stable Diffusion UNet in the original layout")
    inpaints = _inpaints(name, shapes[_INPUT][1])
    width = next((shapes[key][1] for key in _TEXT_KEYS if key in shapes), None)
    if width == _REFINER_TEXT_WIDTH:
        raise refusal(name, "it is the SDXL refiner, which is read from a diffusers folder only")
    family = FAMILY_BY_TEXT_WIDTH.get(width or 0)
    if family is None or (family is Family.SDXL) != (_SDXL_LABELS in shapes):
        raise refusal(name, "its UNet is none of Stable Diffusion 1.x, 2.x or XL base")
    for part, prefixes in _PARTS.items():
        if not any(key.startswith(prefixes) for key in shapes):
            raise refusal(name, f"the file has no {part}")
    prediction_type = _prediction_type(header, path, family)
    return Traits(
        family,
        _native_side(family, prediction_type),
        prediction_type,
        zero_snr="ztsnr" in shapes,
        num_parameters=header.num_parameters,
        inpaints=inpaints,
    )


_PARTS = {
    "VAE": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}


def _prediction_type(header: Header, path: Path, family: Family) -> PredictionType:
    """What the file says of itself, by ModelSpec's or ComfyUI's marks; else, for 2.x, its weights.

    The last norm's bias spreads wider under v-prediction: ComfyUI's test (model_base, SD20).
    """
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    if stated in ("v", "v_prediction", "epsilon"):
        return "epsilon" if stated == "epsilon" else "v_prediction"
    if "v_pred" in header.shapes:
        return "v_prediction"
    if family is Family.SD21 and _LAST_NORM in header.shapes:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
            spread = float(file.get_tensor(_LAST_NORM).float().std())
        return "v_prediction" if spread > 0.09 else "epsilon"
    return "epsilon"


def _native_side(family: Family, prediction_type: PredictionType) -> int:
    if family is Family.SDXL:
        return 1024
    return 768 if family is Family.SD21 and prediction_type == "v_prediction" else 512


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    shapes: Mapping[str, Sequence[int]]  # by the names of the tensors
    metadata: Mapping[str, str]

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def read_header(name: str, path: Path) -> Header:
    """Reads no tensors. Raises UnsupportedModel, also where the file is shorter than it says."""
    from safetensors import SafetensorError, safe_open  # not above: clients have no safetensors

    try:
        check_header(name, path)
        with safe_open(path, framework="np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            return Header(shapes, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise refusal(name, "it is no safetensors file, or a damaged one") from error


def check_header(name: str, path: Path) -> None:
    """Raises UnsupportedModel for a header that would take long to read and much memory. The
    library itself takes those of 100 MB."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if MAX_HEADER_BYTES < size <= path.stat().st_size:
        raise refusal(name, f"its header has more than {MAX_HEADER_BYTES} bytes")


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
    with _refusing(name, "its configuration holds values that no network has", "ControlNet"):
        return _controlnet_family(name, config)


def _controlnet_family(name: str, config: Mapping[str, Any]) -> Family:
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

    Both are configurations. Where one is None, the family's usual text width stands in for it.
    """
    usual = {"cross_attention_dim": _TEXT_WIDTHS[family]}
    unet, controlnet = unet or usual, controlnet or usual
    for field in ("cross_attention_dim", "block_out_channels"):
        if field in unet and field in controlnet and unet[field] != controlnet[field]:
            return f"its {field} is {controlnet[field]}, not {unet[field]}"
    return None


def refuse_pickles(name: str, kind: Kind = "model") -> None:
    if name.lower().endswith(PICKLED):
        reason = "pickled weights can run code when loaded; only safetensors are read"
        raise refusal(name, reason, kind)


def refusal(name: str, reason: str, kind: Kind = "model") -> UnsupportedModel:
    param = "model" if kind == "model" else "controlnet.type"
    if len(reason) > MAX_REASON:  # it quotes the model's files
        reason = f"{reason[:MAX_REASON]}…"
    return UnsupportedModel(f"{kind} {name} is not supported: {reason}", param=param)
