"""Files become modules: the right weights, in the right precision, ready to use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from sdbento.catalog import hub
from sdbento.catalog.families import Family
from sdbento.catalog.layout import INDEX
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.errors import ModelLoadFailed
from sdbento.models import device, weights
from sdbento.models.acceleration.fp8 import Fp8Linear
from sdbento.models.pipeline import modules, networks, num_bytes
from sdbento.models.weights import pull
from tests.support.checkpoints import save_tiny_checkpoint
from tests.support.loading import load, load_controlnet, resolve, resolve_controlnet, settings, spec
from tests.support.tiny import save_tiny, save_tiny_controlnet, tiny_controlnet, tiny_pipeline

GPU = torch.device("cuda")


def assert_same_networks(pipe: Any, kind: str) -> None:
    for name, part in tiny_pipeline(kind).components.items():
        if isinstance(part, torch.nn.Module):
            loaded, original = getattr(pipe, name).state_dict(), part.state_dict()
            assert loaded.keys() == original.keys()
            assert all(torch.equal(loaded[key], original[key]) for key in original), name


@pytest.mark.parametrize("family", Family)
def test_a_folder_is_loaded_ready_to_use(family: Family, tmp_path: Path) -> None:
    pipeline = load(resolve(save_tiny(family, tmp_path / "mine")), settings())
    assert_same_networks(pipeline.pipe, family)
    assert pipeline.is_sdxl == (family is Family.SDXL)
    original = tiny_pipeline(family).scheduler.config
    stated = {key: value for key, value in original.items() if key[0] != "_"}
    assert pipeline.scheduler_config.items() >= stated.items()
    assert pipeline.scheduler_config["_class_name"] == original["_class_name"]
    assert pipeline.nbytes == num_bytes(modules(tiny_pipeline(family)))
    assert (pipeline.latent_channels, pipeline.pipe.vae_scale_factor) == (4, 8)
    assert not (pipeline.inpaints or pipeline.requires_aesthetics_score)
    for module in networks(pipeline):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_neither_safety_checker_nor_watermark_is_loaded(tmp_path: Path) -> None:
    pipe = load(resolve(save_tiny("sd15", tmp_path / "a")), settings()).pipe
    assert pipe.safety_checker is pipe.feature_extractor is None
    assert load(resolve(save_tiny("sdxl", tmp_path / "b")), settings()).pipe.watermark is None


@pytest.mark.parametrize("family", Family)
def test_a_single_file_gives_the_networks_of_its_folder(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = save_tiny(family, tmp_path / "configs")
    for path in configs.rglob("*.safetensors"):
        path.unlink()
    monkeypatch.setattr(hub, "fetch_configs", lambda *_, **__: configs)
    file = save_tiny_checkpoint(family, tmp_path / "mine.safetensors")
    pipeline = load(spec(family, file), settings())
    assert_same_networks(pipeline.pipe, family)
    assert (
        pipeline.pipe.tokenizer("a cat").input_ids
        == tiny_pipeline(family).tokenizer("a cat").input_ids
    )


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_the_scheduler_is_the_repositorys_without_the_changes_of_a_constructor(
    tmp_path: Path,
) -> None:
    """Which of a scheduler's options a stock pipeline overrides depends on the task."""
    folder = save_tiny("sd15", tmp_path / "mine")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps_offset": 0}))
    assert load(resolve(folder), settings()).scheduler_config["steps_offset"] == 0


# Models for one task


@pytest.mark.parametrize("family", Family)
def test_an_inpainting_model_is_loaded_as_the_stock_pipeline(
    family: Family, tmp_path: Path
) -> None:
    pipeline = load(resolve(save_tiny(f"{family}-inpaint", tmp_path / "mine")), settings())
    assert type(pipeline.pipe) is type(tiny_pipeline(family))
    assert_same_networks(pipeline.pipe, f"{family}-inpaint")
    assert pipeline.inpaints
    assert pipeline.latent_channels == 4, "of the VAE, though the UNet has 9 inputs"
    assert not pipeline.requires_aesthetics_score


@pytest.mark.parametrize("family", Family)
def test_an_inpainting_single_file_is_read_with_its_familys_configurations(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = save_tiny(family, tmp_path / "configs")
    monkeypatch.setattr(hub, "fetch_configs", lambda *_, **__: configs)
    file = save_tiny_checkpoint(f"{family}-inpaint", tmp_path / "mine.safetensors")
    pipeline = load(spec(family, file, inpaints=True), settings())
    assert_same_networks(pipeline.pipe, f"{family}-inpaint")
    assert pipeline.inpaints


def test_the_refiner_is_loaded_with_the_components_it_has(tmp_path: Path) -> None:
    pipeline = load(resolve(save_tiny("sdxl-refiner", tmp_path / "mine")), settings())
    assert_same_networks(pipeline.pipe, "sdxl-refiner")
    assert pipeline.pipe.text_encoder is pipeline.pipe.tokenizer is pipeline.pipe.watermark is None
    assert pipeline.requires_aesthetics_score
    assert pipeline.is_sdxl
    assert not pipeline.inpaints


@pytest.mark.parametrize("family", Family)
def test_a_model_saved_for_image_to_image_is_loaded_too(family: Family, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "mine")
    index = folder / INDEX
    index.write_text(
        re.sub(r"(StableDiffusion(XL)?)Pipeline", r"\1Img2ImgPipeline", index.read_text())
    )
    pipeline = load(resolve(folder), settings())
    assert type(pipeline.pipe) is type(tiny_pipeline(family))
    assert_same_networks(pipeline.pipe, family)


# ControlNets


@pytest.mark.parametrize("family", Family)
def test_a_controlnet_is_loaded_ready_to_use(family: Family, tmp_path: Path) -> None:
    folder = save_tiny_controlnet(family, tmp_path / "control")
    wanted = resolve_controlnet(folder, resolve(save_tiny(family, tmp_path / "mine")))
    network = load_controlnet(wanted)
    original = tiny_controlnet(family)
    loaded = network.module.state_dict()
    assert all(torch.equal(loaded[key], t) for key, t in original.state_dict().items())
    assert (network.spec, network.dtype) == (wanted, torch.float32)
    assert network.nbytes == num_bytes([original]) > 0
    assert [*networks(network)] == [network.module]
    assert not network.module.training
    assert not any(parameter.requires_grad for parameter in network.module.parameters())
    kinds = {type(processor) for processor in network.module.attn_processors.values()}
    assert kinds == {AttnProcessor2_0}


def test_a_half_precision_controlnet_is_used_where_there_is_no_other(tmp_path: Path) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "control", variant="fp16")
    wanted = ControlNetSpec("mine", Family.SD15, (str(folder),), 0.1)
    assert load_controlnet(wanted).dtype is torch.float32


def test_a_single_files_prediction_type_overrides_its_familys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = save_tiny("sdxl", tmp_path / "configs")
    monkeypatch.setattr(hub, "fetch_configs", lambda *_, **__: configs)
    file = save_tiny_checkpoint("sdxl", tmp_path / "mine.safetensors")
    wanted = spec(Family.SDXL, file, prediction_type="v_prediction", zero_snr=True)
    config = load(wanted, settings()).scheduler_config
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True
    assert config["timestep_spacing"] == "trailing"


def test_a_single_file_without_its_familys_configurations_is_refused_with_the_remedy(
    tmp_path: Path,
) -> None:
    file = save_tiny_checkpoint("sd21", tmp_path / "mine.safetensors")
    with pytest.raises(ModelLoadFailed, match="`sdbento pull sd21` fetches them"):
        load(spec(Family.SD21, file), settings())


def test_fp16_variants_are_used_where_wanted_or_where_there_is_no_other(tmp_path: Path) -> None:
    folder = save_tiny("sd15", tmp_path / "mine", variant="fp16")
    mine = resolve(folder)
    assert weights._variant(weights._files(mine, folder, torch.float16)) == "fp16"
    assert_same_networks(load(mine, settings()).pipe, Family.SD15)
    save_tiny("sd15", folder)
    assert weights._variant(weights._files(mine, folder, torch.float16)) == "fp16"
    assert weights._variant(weights._files(mine, folder, torch.float32)) is None


@pytest.mark.parametrize(
    ("fields", "half"),
    [
        ({"device": "cuda"}, True),  # an image builder, which has no GPU
        ({"device": "cuda", "precision": "fp32"}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_pulling_fetches_what_loading_will_need(
    fields: dict[str, Any], half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def fetch(spec: ModelSpec, half: bool, offline: bool) -> Path:
        asked.append(half)
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    said: list[str] = []
    wanted = Catalog(settings()).resolve("sdxl")
    assert pull(wanted, settings(**fields), said.append) == [tmp_path]
    assert asked == [half]
    assert "stabilityai/stable-diffusion-xl-base-1.0" in said[0]


def test_pulling_a_single_file_fetches_its_familys_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_tiny_checkpoint("sdxl", tmp_path / "mine.safetensors")
    monkeypatch.setattr(hub, "fetch_configs", lambda *_, **__: tmp_path)
    assert pull(spec(Family.SDXL, file), settings()) == [file, tmp_path]


def test_pulling_a_controlnet_fetches_what_loading_will_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(*given: Any) -> Path:
        asked.append(given)
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    catalog = Catalog(settings())
    wanted = catalog.controlnets(catalog.resolve("sd15")).resolve("canny")
    said: list[str] = []
    assert pull(wanted, settings(device="cuda", offline=False), said.append) == [tmp_path]
    assert asked == [(wanted, True, False)]
    assert "fp16 weights from lllyasviel/control_v11p_sd15_canny" in said[0]


# On a GPU, for which the CPU stands in: nothing is moved


@dataclass(frozen=True)
class Moved:
    """A pipeline's parts as they were when they were moved to the GPU."""

    precision: dict[str, torch.dtype]
    channels_last: list[str]
    num_fp8: int


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Moved]:
    seen: list[Moved] = []

    def note(parts: Iterable[torch.nn.Module], device: torch.device) -> None:
        assert device == GPU
        by_name = {type(part).__name__: part for part in parts}
        weights_of = {name: next(part.parameters()) for name, part in by_name.items()}
        last = [name for name, part in by_name.items() if is_channels_last(part)]
        num_fp8 = sum(isinstance(m, Fp8Linear) for p in by_name.values() for m in p.modules())
        seen.append(Moved({n: w.dtype for n, w in weights_of.items()}, last, num_fp8))

    monkeypatch.setattr(weights, "move", note)
    monkeypatch.setattr(weights, "choose_device", lambda _: GPU)
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return seen


def is_channels_last(part: torch.nn.Module) -> bool:
    kernels = [p for p in part.parameters() if p.dim() == 4 and p.shape[2:] != (1, 1)]
    return bool(kernels) and all(
        kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels
    )


@pytest.mark.parametrize("is_compiled", [False, True])
def test_weights_have_their_precision_and_order_before_they_move(
    is_compiled: bool, moved: list[Moved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CompiledUnet", lambda *_: None)
    folder = save_tiny("sdxl", tmp_path / "mine")
    pipeline = load(resolve(folder), settings(precision="fp16", compile=is_compiled))
    [parts] = moved
    assert parts.precision["AutoencoderKL"] is pipeline.vae_dtype is torch.bfloat16
    assert parts.precision["UNet2DConditionModel"] is pipeline.dtype is torch.float16
    last = {"AutoencoderKL"} | ({"UNet2DConditionModel"} if is_compiled else set())
    assert set(parts.channels_last) == last


def test_the_unet_is_converted_to_fp8_once_it_is_on_the_gpu(
    moved: list[Moved], tmp_path: Path
) -> None:
    pipeline = load(resolve(save_tiny("sdxl", tmp_path / "mine")), settings(precision="fp8"))
    assert moved[0].num_fp8 == 0
    converted = [part for part in networks(pipeline) for m in part.modules() if is_fp8(m)]
    assert converted and {type(part) for part in converted} == {type(pipeline.unet)}
    assert pipeline.dtype is torch.bfloat16
    assert pipeline.nbytes == num_bytes(networks(pipeline))


def is_fp8(module: torch.nn.Module) -> bool:
    return isinstance(module, Fp8Linear) and module.weight.dtype is torch.float8_e4m3fn


def test_a_controlnet_moves_and_stays_in_bf16_beside_fp8(
    moved: list[Moved], tmp_path: Path
) -> None:
    model = resolve(save_tiny("sd15", tmp_path / "mine"))
    spec = resolve_controlnet(save_tiny_controlnet("sd15", tmp_path / "control"), model)
    loaded = weights.load(spec, settings(precision="fp8"))
    assert moved[0].precision == {"ControlNetModel": torch.bfloat16}
    assert not [m for part in networks(loaded) for m in part.modules() if is_fp8(m)]
