"""What a LoRA's tensors mean for one model: two matrices and a scale for each of its layers.

Reads what kohya's trainer, diffusers (old and new), PEFT and ComfyUI write. The names are
translated by diffusers' own conversions. Each layer has its own alpha, which is its rank if the
file gives none. Whatever is not two matrices whose product is added to a layer's output is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

from sdbento.catalog.families import FAMILY_BY_TEXT_WIDTH, Family
from sdbento.catalog.specs import ModelSpec
from sdbento.errors import UnsupportedModel
from sdbento.lora.files import PEFT_CONFIG, LoraFile
from sdbento.lora.lookup import LoraSource, refusal
from sdbento.lora.names import translated
from sdbento.models.memory.transfer import copied
from sdbento.models.pipeline import Pipeline

T = TypeVar("T")

PARTS = ("unet", "text_encoder", "text_encoder_2")
MAX_KEY_CHARS = 100  # of a tensor's name in a message
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_LAYER = re.compile(r"(.+)\.lora_([AB])\.weight")
_VARIANTS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    ".oft_": "OFT",
    "lora_mid": "a LoCon with a third matrix",
    "bundle_emb": "a LoRA with textual inversions inside",
    "lora_B.bias": "a LoRA with biases",
    ".diff": "a LoRA with whole differences of weights",
}
_FAMILY_NAMES = {
    Family.SD15: "Stable Diffusion 1.x",
    Family.SD21: "Stable Diffusion 2.x",
    Family.SDXL: "Stable Diffusion XL",
}
_STATED = {  # in the metadata that kohya's trainer and the ModelSpec standard write
    Family.SD15: ("sd_v1", "stable-diffusion-v1"),
    Family.SD21: ("sd_v2", "stable-diffusion-v2"),
    Family.SDXL: ("sdxl", "stable-diffusion-xl"),
}
_TEXT_DOWN = re.compile(r".*attn2[._](?:processor\.)?to_[kv].*(?:down|lora_A)\.weight")


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to one layer: weight * scale * up(down(x)).

    down: [rank, in] or [rank, in, height, width]; up: [out, rank] or [out, rank, 1, 1];
    scale: alpha / rank.
    """

    down: Tensor
    up: Tensor
    scale: float


Parts = Mapping[str, Mapping[str, LowRank]]


def check_family(source: LoraSource, spec: ModelSpec) -> None:
    """Raise UnsupportedModel for a LoRA that the catalogue has for another family."""
    if source.family not in (None, spec.family):
        raise _misfit(source, source.family, spec, "the catalogue says so")


def to_parts(
    source: LoraSource, file: LoraFile, pipeline: Pipeline
) -> tuple[Parts, tuple[str, ...]]:
    """The matrices by part and layer, copied to the model's device in its precision, and warnings.

    Layers that the model does not have are left out, as by diffusers, if it has most of them.
    Raises UnsupportedModel, with the reason, for a file that is no plain LoRA or does not fit.
    """
    for key in file.tensors:
        for mark, kind in _VARIANTS.items():
            if mark in key:
                raise refusal(source.name, f"it is {kind}; only plain LoRA and LoCon are")
    check_family(source, pipeline.spec)
    try:
        file = replace(file, tensors=translated(file.tensors))
        tensors, alphas = _by_part(file, pipeline)
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        raise refusal(
            source.name,
            "its layers are not named as kohya's trainer, diffusers, PEFT or ComfyUI name them",
        ) from error
    warnings = tuple(_warn_of_absent(source, file, pipeline, tensors))
    parts = {
        part: dict(_layers_of(part, source, file, pipeline, tensors[part], alphas[part]))
        for part in PARTS
        if tensors[part]
    }
    if not parts:
        raise refusal(source.name, "the file has no LoRA layers")
    return _on_device(parts, pipeline.device), warnings


def num_bytes(parts: Parts) -> int:
    return sum(matrix.numel() * matrix.element_size() for matrix in _matrices(parts))


def _matrices(parts: Parts) -> list[Tensor]:
    return [m for layers in parts.values() for low in layers.values() for m in (low.down, low.up)]


def _on_device(parts: Parts, device: torch.device) -> Parts:
    """All at once: one by one, each of hundreds would wait for a step of the images under way."""
    moved = iter(copied(_matrices(parts), device))
    return {
        part: {
            name: LowRank(next(moved), next(moved), low_rank.scale)
            for name, low_rank in layers.items()
        }
        for part, layers in parts.items()
    }


def _by_part(
    file: LoraFile, pipeline: Pipeline
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, float]]]:
    """The matrices of each part by PEFT's keys, and the alphas of each part by layer.

    Raises KeyError, or whatever diffusers' conversions raise, for keys that are neither.
    """
    tensors = dict(file.tensors)
    alphas: dict[str, float] = {}
    if tensors and all(key.startswith(_KOHYA) for key in tensors):
        tensors, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
            tensors, unet_config=pipeline.unet.config
        )
    else:
        if not any(key.startswith(tuple(f"{part}." for part in PARTS)) for key in tensors):
            tensors = {f"unet.{key}": tensor for key, tensor in tensors.items()}
        given = [key for key in tensors if key.endswith(".alpha")]
        alphas = {key: tensors.pop(key).item() for key in given}
    by_part = {part: _peft_names(part, _inside(part, tensors), pipeline) for part in PARTS}
    if sum(map(len, by_part.values())) != len(tensors):
        raise KeyError("keys of no part, or two that mean the same")
    named = {key.removesuffix(".alpha"): alpha for key, alpha in (alphas or {}).items()}
    by_layer = {part: _peft_names(part, _inside(part, named), pipeline) for part in PARTS}
    return by_part, {
        part: {key.partition(".lora_A")[0]: alpha for key, alpha in layers.items()}
        for part, layers in by_layer.items()
    }


def _inside(part: str, values: Mapping[str, T]) -> dict[str, T]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _peft_names(part: str, values: dict[str, T], pipeline: Pipeline) -> dict[str, T]:
    """With keys as in PEFT: the layer's name, then lora_A or lora_B."""
    if part == "unet":
        named: dict[str, T] = convert_unet_state_dict_to_peft(values)
        return named
    # Given the type, because diffusers can guess it for complete layers only.
    for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        values = convert_state_dict_to_peft(values, kind)
    if hasattr(getattr(pipeline.pipe, part, None), "text_model"):
        return values
    return {key.removeprefix("text_model."): value for key, value in values.items()}


def _warn_of_absent(
    source: LoraSource,
    file: LoraFile,
    pipeline: Pipeline,
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[str]:
    """A warning if the model lacks some of the layers. Raises UnsupportedModel if it lacks most."""
    names = {(part, _LAYER.sub(r"\1", key)) for part in PARTS for key in tensors[part]}
    present = {part: dict(_modules(pipeline, part)) for part in PARTS}
    absent = sorted(name for part, name in names if name not in present[part])
    if 2 * len(absent) > len(names):
        raise _misfit(
            source,
            _likely_family(source, file),
            pipeline.spec,
            f"the model has no layer {_short(absent[0])}",
        )
    if absent:
        yield (
            f"LoRA {source.name}: {len(absent)} of its {len(names)} layers are not in the model "
            f"and were left out, such as {_short(absent[0])}"
        )


def _modules(pipeline: Pipeline, part: str) -> Iterator[tuple[str, nn.Module]]:
    network = getattr(pipeline.pipe, part, None)
    return iter(()) if network is None else network.named_modules()


def _layers_of(
    part: str,
    source: LoraSource,
    file: LoraFile,
    pipeline: Pipeline,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
) -> Iterator[tuple[str, LowRank]]:
    def misfit(reason: str) -> UnsupportedModel:
        return _misfit(source, _likely_family(source, file), pipeline.spec, reason)

    network = getattr(pipeline.pipe, part, None)
    if network is None:
        raise misfit(f"the model has no {part}")
    layers = dict(network.named_modules())
    stated = _stated_alphas(part, source, file)
    for name, (down, up) in _pairs(source.name, tensors):
        if name not in layers:
            continue  # `_warn_of_absent` has told
        rank = len(down)
        fitted = _fit(layers.get(name), down, up)
        if fitted is None:
            raise misfit(_mismatch(name, layers.get(name), down, up))
        scale = _scale(name, rank, alphas, stated)
        if not math.isfinite(scale):
            raise refusal(source.name, f"the alpha of its layer {_short(name)} is not finite")
        down, up = (matrix.to(pipeline.dtype, copy=True).contiguous() for matrix in fitted)
        if not (down.isfinite().all() and up.isfinite().all()):
            raise refusal(
                source.name, f"its layer {_short(name)} has values that are not finite numbers"
            )
        yield name, LowRank(down, up, scale)


def _pairs(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Layer names with their (down, up)."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            raise refusal(name, f"it has a key that is none of a LoRA's: {_short(key)}")
        if tensor.dim() not in (2, 4) or not tensor.numel() or not tensor.is_floating_point():
            raise refusal(name, f"{_short(key)} is empty or no matrix of floating-point numbers")
        halves.setdefault(match[1], {})[match[2]] = tensor
    for layer, pair in halves.items():
        if len(pair) != 2:
            raise refusal(name, f"its layer {_short(layer)} has only one of two matrices")
        yield layer, (pair["A"], pair["B"])


def _fit(layer: nn.Module | None, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """The matrices reshaped for the layer, or None if their shapes do not fit it."""
    rank = len(down)
    if isinstance(layer, nn.Linear):
        down, up = (m[:, :, 0, 0] if m.shape[2:] == (1, 1) else m for m in (down, up))
        inner: tuple[int, ...] = (rank, layer.in_features)
        outer: tuple[int, ...] = (layer.out_features, rank)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        down, up = (m[:, :, None, None] if m.dim() == 2 else m for m in (down, up))
        inner = (rank, layer.in_channels, *layer.kernel_size)
        outer = (layer.out_channels, rank, 1, 1)
    else:
        return None
    return (down, up) if (down.shape, up.shape) == (inner, outer) else None


def _stated_alphas(part: str, source: LoraSource, file: LoraFile) -> dict[str, Any]:
    """The alphas in PEFT's configuration of `part`, which newer diffusers write into the file, and
    PEFT itself beside it."""
    try:
        stated = json.loads(file.metadata.get(LORA_ADAPTER_METADATA_KEY) or "{}")
        config = _inside(part, stated) or json.loads(file.metadata.get(PEFT_CONFIG) or "{}")
        patterns = config.get("alpha_pattern") or {}
        return {
            "alpha": None if config.get("lora_alpha") is None else float(config["lora_alpha"]),
            "alphas": {str(key).removeprefix("^"): float(v) for key, v in patterns.items()},
            "by_root": bool(config.get("use_rslora")),
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise refusal(source.name, "the metadata of its adapter cannot be read") from error


def _scale(name: str, rank: int, alphas: Mapping[str, float], stated: Mapping[str, Any]) -> float:
    """alpha / rank. alpha is the layer's own, else that of PEFT's configuration, else the rank."""
    alpha = alphas.get(name, stated["alpha"])
    for ending, value in stated["alphas"].items():
        if name == ending or name.endswith(f".{ending}"):
            alpha = value
            break
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if stated["by_root"] else rank)


def _mismatch(name: str, layer: nn.Module | None, down: Tensor, up: Tensor) -> str:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return f"the model has no layer {_short(name)}"
    return (
        f"{_short(name)} has weights of {tuple(layer.weight.shape)} in the model, "
        f"matrices of {tuple(up.shape)} and {tuple(down.shape)} in the LoRA"
    )


def _misfit(
    source: LoraSource, made_for: Family | None, spec: ModelSpec, reason: str
) -> UnsupportedModel:
    likely = f"model {source.model}" if source.model not in (None, spec.name) else "another model"
    if made_for not in (None, spec.family):
        likely = _FAMILY_NAMES[made_for]
    return UnsupportedModel(
        f"LoRA {source.name} does not fit model {spec.name} ({_FAMILY_NAMES[spec.family]}): it is "
        f"likely made for {likely} ({reason})",
        param="lora",
    )


def _likely_family(source: LoraSource, file: LoraFile) -> Family | None:
    """What the catalogue or the file says, else a guess from the width of the text its layers
    read."""
    if source.family is not None:
        return source.family
    stated = " ".join(
        file.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")
    )
    for family, marks in _STATED.items():
        if any(mark in stated.lower() for mark in marks):
            return family
    if any(key.startswith(("text_encoder_2.", "lora_te2_")) for key in file.tensors):
        return Family.SDXL
    for key, tensor in file.tensors.items():
        if _TEXT_DOWN.fullmatch(key) and tensor.dim() > 1:
            return FAMILY_BY_TEXT_WIDTH.get(tensor.shape[1])
    return None


def _short(key: str) -> str:
    return key if len(key) <= MAX_KEY_CHARS else f"{key[:MAX_KEY_CHARS]}…"
