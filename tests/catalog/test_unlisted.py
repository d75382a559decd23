"""Models are recognised by their files; those that cannot be served are refused with a reason."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdbento.catalog import families
from sdbento.catalog.families import Family
from sdbento.catalog.layout import INDEX
from sdbento.catalog.lookup import Catalog
from sdbento.environment import load_settings
from sdbento.errors import ModelLoadFailed, UnsupportedModel
from tests.support.checkpoints import LAST_NORM, SD15, SD21, SDXL, UNET_PREFIX, save_zeros
from tests.support.tiny import save_tiny


def make(**settings: Any) -> Catalog:
    return Catalog(
        load_settings(
            **{"sd_model": "shapes", "offline": True, "allow_any_model": True, **settings}
        )
    )


def changed(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    os.utime(folder / INDEX, ns=(0, 0))  # caches notice a change by the time
    return folder


@pytest.mark.parametrize("family", Family)
def test_a_diffusers_folder_is_known_by_its_configurations(family: Family, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "mine")
    spec = make().resolve(str(folder))
    assert spec.family is family
    assert (spec.name, spec.sources) == (str(folder), (str(folder),))
    assert (spec.width, spec.height) == (64, 64)
    assert spec.memory_gb < 0.1, "its weights are counted"


@pytest.mark.parametrize(
    ("tensors", "family", "side"),
    [(SD15, "sd15", 512), (SD21, "sd21", 512), (SDXL, "sdxl", 1024)],
)
def test_a_single_file_is_known_by_its_header(
    tensors: dict[str, Any], family: str, side: int, tmp_path: Path
) -> None:
    spec = make().resolve(str(save_zeros(tmp_path / "model.safetensors", tensors)))
    assert (spec.family, spec.width, spec.prediction_type) == (family, side, "epsilon")


def test_a_replaced_file_is_read_again(tmp_path: Path) -> None:
    path = save_zeros(tmp_path / "model.safetensors", SD15)
    assert make().resolve(str(path)).family is Family.SD15
    save_zeros(path, SDXL)
    os.utime(path, ns=(1, 1))
    assert make().resolve(str(path)).family is Family.SDXL


# Prediction types of single files


@pytest.mark.parametrize(("spread", "side"), [(0.2, 768), (0.01, 512)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_v_prediction_of_sd2_is_recognised_by_the_spread_of_a_bias(
    dtype: torch.dtype, spread: float, side: int, tmp_path: Path
) -> None:
    bias = torch.from_numpy(np.random.default_rng(0).normal(0, spread, 320)).to(dtype)
    tensors = {key: torch.zeros(*shape) for key, shape in SD21.items()} | {LAST_NORM: bias}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    traits = families.from_checkpoint("model", path)
    assert traits.prediction_type == ("v_prediction" if side == 768 else "epsilon")
    assert traits.side == side


def test_a_file_may_state_its_own_prediction_type(tmp_path: Path) -> None:
    marked = {**SDXL, "v_pred": (), "ztsnr": ()}
    traits = families.from_checkpoint("m", save_zeros(tmp_path / "a.safetensors", marked))
    assert (traits.prediction_type, traits.zero_snr) == ("v_prediction", True)
    stated = {"modelspec.prediction_type": "v"}
    traits = families.from_checkpoint("m", save_zeros(tmp_path / "b.safetensors", SD21, stated))
    assert (traits.prediction_type, traits.side) == ("v_prediction", 768)


# What is refused


def test_a_folder_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("sd15", tmp_path / "mine")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsupportedModel, match="its unet has pickled weights only"):
        make().resolve(str(folder))


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("sd15", tmp_path / "mine")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match="the weights of its vae are not there"):
        make().resolve(str(folder))


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        (INDEX, {"_class_name": "FluxPipeline"}, "it is a FluxPipeline"),
        (INDEX, {"_class_name": ["code", "Mine"]}, "it is a"),
        (INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, "its vae is diffusers.Auto"),
        (INDEX, {"unet": ["code", "UNet2DConditionModel"]}, "its unet is code.UNet2D"),
        (INDEX, {"text_encoder": [None, None]}, "its text_encoder is missing"),
        (INDEX, {"scheduler": ["code", "Mine"]}, "its scheduler is not one of diffusers"),
        ("unet/config.json", {"in_channels": 8}, "8 input channels"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "takes guidance"),
        ("unet/config.json", {"addition_embed_type": "text"}, "takes conditions"),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    file: str, values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = changed(save_tiny("sd15", tmp_path / "mine"), file, **values)
    with pytest.raises(UnsupportedModel, match=reason):
        make().resolve(str(folder))


FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}
DEPTH = {**SD15, UNET_PREFIX + "input_blocks.0.0.weight": (320, 5, 3, 3)}
REFINER = {
    **SDXL,
    UNET_PREFIX + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
}
UNCLIP = {**SD21, UNET_PREFIX + "label_emb.0.0.weight": (1280, 2048)}
NO_VAE = {key: shape for key, shape in SD15.items() if not key.startswith("first_stage")}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (FLUX, "no Stable Diffusion UNet"),
        (DEPTH, "5 input channels"),
        (REFINER, "the SDXL refiner, which is read from a diffusers folder only"),
        (UNCLIP, "none of Stable Diffusion"),
        (NO_VAE, "has no VAE"),
    ],
)
def test_a_single_file_of_another_kind_is_refused(
    tensors: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = save_zeros(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UnsupportedModel, match=reason):
        make().resolve(str(path))


@pytest.mark.parametrize(
    "content",
    [b"", b"short", struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"[]", b"\x09" + b"\0" * 40],
)
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match="no safetensors file"):
        make().resolve(str(path))


def test_a_file_that_is_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    path = save_zeros(tmp_path / "model.safetensors", SD15)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UnsupportedModel, match="or a damaged one"):
        make().resolve(str(path))


# Models for one task


@pytest.mark.parametrize("family", Family)
def test_an_inpainting_model_is_known_by_the_inputs_of_its_unet(
    family: Family, tmp_path: Path
) -> None:
    spec = make().resolve(str(save_tiny(f"{family}-inpaint", tmp_path / "mine")))
    assert (spec.family, spec.inpaints, spec.refines) == (family, True, False)
    plain = save_tiny(family, tmp_path / "plain")
    kind = json.loads((tmp_path / "mine" / INDEX).read_text())["_class_name"]
    assert "Inpaint" in kind
    assert not make().resolve(str(changed(plain, INDEX, _class_name=kind))).inpaints


@pytest.mark.parametrize(("tensors", "family"), [(SD15, "sd15"), (SD21, "sd21"), (SDXL, "sdxl")])
def test_a_single_file_inpainting_model_is_known_by_the_inputs_of_its_unet(
    tensors: dict[str, Any], family: str, tmp_path: Path
) -> None:
    wider = {**tensors, UNET_PREFIX + "input_blocks.0.0.weight": (320, 9, 3, 3)}
    spec = make().resolve(str(save_zeros(tmp_path / "model.safetensors", wider)))
    assert (spec.family, spec.inpaints) == (family, True)


def test_the_refiner_is_known_by_its_aesthetic_score(tmp_path: Path) -> None:
    spec = make().resolve(str(save_tiny("sdxl-refiner", tmp_path / "mine")))
    assert (spec.family, spec.refines, spec.inpaints) == (Family.SDXL, True, False)


@pytest.mark.parametrize("family", Family)
def test_an_image_to_image_pipeline_is_an_ordinary_model(family: Family, tmp_path: Path) -> None:
    kind = f"StableDiffusion{'XL' if family is Family.SDXL else ''}Img2ImgPipeline"
    folder = changed(save_tiny(family, tmp_path / "mine"), INDEX, _class_name=kind)
    spec = make().resolve(str(folder))
    assert (spec.family, spec.refines, spec.inpaints) == (family, False, False)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"requires_aesthetics_score": False}, "its text_encoder is missing"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "is not the SDXL refiner"),
        ({"text_encoder_2": [None, None]}, "its text_encoder_2 is missing"),
    ],
)
def test_half_a_refiner_is_refused(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = changed(save_tiny("sdxl-refiner", tmp_path / "mine"), INDEX, **values)
    with pytest.raises(UnsupportedModel, match=reason):
        make().resolve(str(folder))
