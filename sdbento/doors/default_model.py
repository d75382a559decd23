"""Which model a request gets that names none, if the operator has not named one either.

One rule for `make serve`, `sdbento serve`, `bentoml serve` and `sdbento generate`: SD_MODEL, if it
is set; else SDXL base on a machine with a GPU; else the embedded model, since SDXL would take a CPU
minutes an image. A worker of RunPod's queue does not follow it: where its GPU is missing it must
not answer paid jobs with emoji.
"""

from __future__ import annotations

from glob import glob

from sdbento.settings import Settings

EMBEDDED = "emoji"
NOTICE = f"no GPU here: using the embedded model `{EMBEDDED}`; --model or SD_MODEL names another"
# NVIDIA's devices, those of its Jetsons, of WSL and of AMD.
GPU_DRIVERS = ("/dev/nvidia*", "/dev/nvhost*", "/dev/dxg", "/dev/kfd")


def with_default_model(settings: Settings) -> Settings:
    """The settings, with the default model decided; the same object if they name it already."""
    if "sd_model" in settings.model_fields_set or has_gpu(settings):
        return settings
    return settings.model_copy(update={"sd_model": EMBEDDED})


def reason(settings: Settings) -> str:
    """Why the default model is what `with_default_model` makes of these settings."""
    if "sd_model" in settings.model_fields_set:
        return "SD_MODEL names it"
    if has_gpu(settings):
        return "SD_MODEL is unset, and there is a GPU"
    return "SD_MODEL is unset, and no GPU is used; a RunPod worker would take SDXL all the same"


def has_gpu(settings: Settings) -> bool:
    if settings.device == "cpu" or not any(glob(driver) for driver in GPU_DRIVERS):
        return False  # without importing torch, which takes a second
    import torch

    return torch.cuda.is_available()
