"""From files to modules on the device: the only `from_pretrained` of the project.

Only safetensors are read. Knows nothing of who uses a model or for how long.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

# While diffusers is imported, transformers would log about components that are not used here.
transformers.logging.set_verbosity_error()

from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError

from sdbento.catalog import hub
from sdbento.catalog.configs import check_configs
from sdbento.catalog.downloads.process import HubProcess
from sdbento.catalog.families import INPAINT_CHANNELS, VAE_FACTOR, Family
from sdbento.catalog.folder import list_files
from sdbento.catalog.specs import ControlNetSpec, ModelSpec, Spec, family_configs
from sdbento.catalog.unlisted import SUFFIX, count_parameters
from sdbento.errors import ModelLoadFailed, OutOfMemory
from sdbento.models.acceleration import channels_last, fp8
from sdbento.models.acceleration.attention import fit
from sdbento.models.acceleration.torch_compile import CompiledUnet
from sdbento.models.checks import check_complete, check_pipeline
from sdbento.models.device import GB, choose_device, choose_dtype, choose_vae_dtype
from sdbento.models.memory.read_ahead import read_ahead
from sdbento.models.memory.transfer import move
from sdbento.models.pipeline import ControlNet, Pipeline, Resident, modules, num_bytes
from sdbento.settings import Settings

log = logging.getLogger(__name__)

# diffusers and transformers patch torch.nn.Module for the whole process while they construct. Two
# constructions at once leave tensors without data: "Cannot copy out of meta tensor; no data!".
constructing = threading.Lock()


def load(spec: Spec, settings: Settings) -> Resident:
    """Files of this machine to modules on the device. Blocking, for seconds.

    Raises errors of the `errors` tree and whatever the libraries raise.
    """
    device = choose_device(settings)
    dtype = choose_dtype(settings, device)
    path = hub.fetch(spec, dtype is not torch.float32, offline=True)
    if path.is_dir():
        check_configs(hub.read_layout(spec, str(path), offline=True), path)
    files = _files(spec, path, dtype)
    read_ahead(files)
    if isinstance(spec, ControlNetSpec):
        return _load_controlnet(spec, path, _variant(files), settings, device, dtype)
    return _load_model(spec, path, _variant(files), settings, device, dtype)


def _load_model(
    spec: ModelSpec,
    path: Path,
    variant: str | None,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
) -> Pipeline:
    configs = _single_file_configs(spec, offline=True) if path.is_file() else None
    pipe = _construct(spec, path, configs, variant, dtype)
    # The scheduler as its repository configures it: the stock constructor changes some of its
    # options, depending on the task.
    pipe.scheduler = type(pipe.scheduler).from_pretrained(configs or path, subfolder="scheduler")
    check_pipeline(spec, pipe)
    _set_prediction(spec, pipe)
    vae_dtype = choose_vae_dtype(spec, bool(pipe.vae.config.get("force_upcast")), dtype)
    if vae_dtype is not dtype:
        pipe.vae.to(vae_dtype)
    _order_in_memory(pipe, settings, device)
    preview_decoder = _load_preview_decoder(spec, dtype)
    parts = [*modules(pipe, preview_decoder)]
    move(parts, device)
    if settings.precision == "fp8" and device.type == "cuda":
        fp8.convert(pipe.unet)
    attention = fit(pipe.unet, settings, _latent_pixels(spec))
    compiled = None
    if settings.compile:
        channels_last.install(pipe.unet)
        channels_last.install(pipe.vae)
        compiled = CompiledUnet(pipe.unet, settings.compile_dir)
    for module in parts:
        module.eval().requires_grad_(False)
    pipeline = Pipeline(
        spec,
        pipe,
        device,
        dtype,
        vae_dtype,
        num_bytes(parts),
        attention,
        compiled,
        preview_decoder,
    )
    _log_loaded(pipeline, f"UNet {dtype}, VAE {vae_dtype}")
    return pipeline


def _load_preview_decoder(spec: ModelSpec, dtype: torch.dtype) -> AutoencoderTiny | None:
    if spec.preview_decoder is None:
        return None
    with constructing, _without_progress_bars():
        return AutoencoderTiny.from_pretrained(
            spec.preview_decoder, use_safetensors=True, local_files_only=True, dtype=dtype
        )


def _load_controlnet(
    spec: ControlNetSpec,
    path: Path,
    variant: str | None,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
) -> ControlNet:
    options = {"dtype": dtype, "local_files_only": True, "variant": variant}
    with constructing, _without_progress_bars():
        module = ControlNetModel.from_pretrained(path, use_safetensors=True, **options)
    check_complete(spec, "network", module)
    move([module], device)
    module.eval().requires_grad_(False)
    attention = fit(module, settings, _latent_pixels(family_configs(spec.family)))
    network = ControlNet(spec, module, device, dtype, num_bytes([module]), attention)
    _log_loaded(network, str(dtype))
    return network


def _log_loaded(loaded: Resident, dtypes: str) -> None:
    log.info(
        "%s is on %s: %.2f GB, %s, attention by %s",
        *(loaded.spec, loaded.device, loaded.nbytes / GB, dtypes, loaded.attention.name),
    )


def _order_in_memory(pipe: Any, settings: Settings, device: torch.device) -> None:
    """Channels last, as a GPU's convolutions compute. An uncompiled UNet would gain nothing from
    that, since its group norms answer in the other order (pytorch issue 111824)."""
    if device.type == "cuda":
        pipe.vae.to(memory_format=torch.channels_last)
        if settings.compile:
            pipe.unet.to(memory_format=torch.channels_last)


def _latent_pixels(spec: ModelSpec) -> int:
    """Of an image of the model's own size."""
    return spec.height * spec.width // VAE_FACTOR**2


def fetch(spec: Spec, settings: Settings, hub_process: HubProcess, capacity: int) -> int:
    """Download what `load` needs; the bytes that the weights take in memory, 0 if unknown.

    Blocking, for minutes; ending `hub_process` ends it. Raises OutOfMemory, before any weights are
    downloaded, if they need more than `capacity` bytes, and what `hub.fetch` raises.
    """
    dtype = choose_dtype(settings, choose_device(settings))
    half = dtype is not torch.float32

    def check(need: int) -> None:
        if need > capacity:
            raise OutOfMemory(
                f"{spec} has weights of {need / GB:.1f} GB, but models may take "
                f"{capacity / GB:.1f} GB together (SDBENTO_MEMORY_GB)",
                param=spec.param,
            )

    options = {"offline": settings.offline, "prefer_cache": settings.prefer_cache}
    path = hub.fetch(spec, half, **options, hub=hub_process, check=check)
    if path.is_file():
        _single_file_configs(spec, **options, hub_process=hub_process)
        return 0  # the spec knows it from the file's header
    layout = hub.read_layout(spec, str(path), offline=True)
    return count_parameters(layout, path, half) * dtype.itemsize


def needs_hub(spec: Spec) -> bool:
    """Whether `fetch` may have something to do: files in folders are complete as they are."""
    source = Path(spec.sources[0])
    return not source.is_absolute() or source.suffix == SUFFIX


def pull(
    spec: Spec,
    settings: Settings,
    progress: Callable[[str], None] = log.info,
) -> list[Path]:
    """Download everything that `load` will need, without loading it; returns where it lies.

    SDBENTO_DEVICE=cuda makes a machine without a GPU, such as an image builder, fetch for one.
    """
    on_gpu = settings.device != "cpu" and (settings.device == "cuda" or torch.cuda.is_available())
    half = on_gpu and settings.precision != "fp32"
    progress(f"{spec.name}: {'fp16' if half else 'fp32'} weights from {', '.join(spec.sources)}")
    paths = [hub.fetch(spec, half, settings.offline)]
    if isinstance(spec, ModelSpec) and paths[0].is_file():
        paths.append(_single_file_configs(spec, settings.offline))
    progress(f"{spec.name}: complete in {', '.join(map(str, paths))}")
    return paths


def _single_file_configs(
    spec: Spec,
    offline: bool,
    prefer_cache: bool = False,
    hub_process: HubProcess | None = None,
) -> Path:
    """A single file holds weights only: configurations and tokenizers are those of its family."""
    configs = family_configs(spec.family)
    try:
        return hub.fetch_configs(configs, offline, prefer_cache, hub=hub_process)
    except Exception as exc:
        lacking = f" ({exc.message})" if isinstance(exc, ModelLoadFailed) else ""
        raise ModelLoadFailed(
            f"model {spec.name} is a single file: it needs the configurations and tokenizers of "
            f"{configs.name} (2 MB), which are not on this machine{lacking} and cannot be "
            f"downloaded now; `sdbento pull {configs.aliases[0]}` fetches them"
        ) from exc


def _options(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """What stock pipelines have and we never use is left out: safety checker and watermark."""
    options = {"dtype": dtype, "local_files_only": True, "feature_extractor": None}
    if spec.family is Family.SDXL:
        return {**options, "add_watermarker": False}
    return {**options, "safety_checker": None, "requires_safety_checker": False}


def _files(spec: Spec, path: Path, dtype: torch.dtype) -> list[Path]:
    """The files of weights that are read for `dtype`; `path` is a folder or a single file."""
    if path.is_file():
        return [path]
    layout = hub.read_layout(spec, str(path), offline=True)
    found = list_files(path)
    return [found[name] for name in layout.weights(found, half=dtype is not torch.float32)]


def _variant(files: list[Path]) -> str | None:
    """The variant of the weights that `from_pretrained` is to read; None for files without one."""
    return "fp16" if any(".fp16" in file.name for file in files) else None


def _construct(
    spec: ModelSpec, path: Path, configs: Path | None, variant: str | None, dtype: torch.dtype
) -> Any:
    """The stock pipeline on the CPU, from a diffusers folder or from a single file."""
    kind = StableDiffusionXLPipeline if spec.family is Family.SDXL else StableDiffusionPipeline
    kind = StableDiffusionXLImg2ImgPipeline if spec.refines else kind
    options = _options(spec, dtype)
    with constructing, _without_progress_bars():
        if configs is not None:
            try:
                if spec.inpaints:  # its family's configuration has a UNet of fewer inputs
                    options["unet"] = UNet2DConditionModel.from_single_file(
                        str(path),
                        config=str(configs),
                        subfolder="unet",
                        in_channels=INPAINT_CHANNELS,
                        dtype=dtype,
                        local_files_only=True,
                    )
                return kind.from_single_file(str(path), config=str(configs), **options)
            except (NotImplementedError, SingleFileComponentError) as exc:  # left without data
                raise ModelLoadFailed(
                    f"model {spec.name}: weights of its UNet or VAE are not in the file"
                ) from exc
        return kind.from_pretrained(path, use_safetensors=True, variant=variant, **options)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Without those of diffusers and transformers; downloads keep huggingface_hub's."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def _set_prediction(spec: ModelSpec, pipe: Any) -> None:
    """Take over what a single file says of its training, which its family's configuration lacks."""
    changes: dict[str, Any] = {}
    if spec.prediction_type is not None:
        changes["prediction_type"] = spec.prediction_type
    if spec.zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if changes:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
