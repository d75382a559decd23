"""Device, precision and memory: what the settings ask for, as far as the hardware can do it.

Where it cannot, the nearest thing that is right is chosen, and the log says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from sdbento.catalog.families import Family
from sdbento.catalog.specs import ModelSpec, Spec
from sdbento.process.malloc import release_freed_memory
from sdbento.settings import Settings, SettingsError

log = logging.getLogger(__name__)

GB = 1e9
FP8_CAPABILITY = 8, 9  # Ada; Hopper has 9.0
GPU_SHARE, CPU_SHARE = 0.85, 0.6  # of the memory; the rest is for activations and everyone else
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def choose_device(settings: Settings) -> torch.device:
    """Raises SettingsError where a GPU is demanded and there is none."""
    if settings.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if settings.device == "cuda":
        raise SettingsError("SDBENTO_DEVICE='cuda': torch sees no GPU; allowed here: auto, cpu")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """What UNet and text encoders compute in: PRECISION, or the nearest that the device can do.

    For fp8 it is bf16, the precision of all that is not converted. Raises SettingsError where the
    GPU cannot do that.
    """
    if settings.precision == "fp32":
        return torch.float32
    if device.type != "cuda":
        say_once(f"PRECISION={settings.precision} needs a GPU: computing in fp32 on the CPU")
        return torch.float32
    if settings.precision == "fp8":
        _check_fp8(device)
        return torch.bfloat16
    if settings.precision == "bf16" and not has_bf16():
        say_once("PRECISION=bf16 needs a newer GPU: computing in fp16")
        return torch.float16
    return torch.bfloat16 if settings.precision == "bf16" else torch.float16


def _check_fp8(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        needed, own = (f"{major}.{minor}" for major, minor in (FP8_CAPABILITY, capability))
        raise SettingsError(
            f"PRECISION=fp8 needs an NVIDIA GPU of compute capability {needed} or newer (Ada, "
            f"Hopper); this one has {own}: use bf16"
        )


def choose_vae_dtype(spec: ModelSpec, force_upcast: bool, dtype: torch.dtype) -> torch.dtype:
    """What the VAE computes in. SDXL's overflows in fp16, which makes black images; bf16 has the
    range, and fp32 is the fallback."""
    if dtype is torch.float16 and spec.family is Family.SDXL and force_upcast:
        return torch.bfloat16 if has_bf16() else torch.float32
    return dtype


def memory_budget_gb(settings: Settings) -> float:
    """GB that resident models may take together. Raises SettingsError as `choose_device` does."""
    if settings.memory_gb is not None:
        return settings.memory_gb
    device = choose_device(settings)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free, GPU_SHARE * total) / GB
    return CPU_SHARE * host_memory()[0] / GB


def host_memory() -> tuple[int, int]:
    """(total, available) bytes of main memory; in a container, of what the container may use."""
    memory = psutil.virtual_memory()
    try:
        limit = int(CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return memory.total, memory.available
    return min(memory.total, limit), min(memory.available, limit - _used_in_container())


def _used_in_container() -> int:
    """Bytes that all processes of this container use, without the files that the kernel caches."""
    try:
        current = int(CGROUP_LIMIT.with_name("memory.current").read_text())
        lines = CGROUP_LIMIT.with_name("memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return int(psutil.Process().memory_info().rss)
    counts = dict(line.split() for line in lines)
    return current - sum(int(counts.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))


def memory_need(spec: Spec, dtype: torch.dtype) -> int:
    """Bytes to reserve for `spec` until it is loaded and can be measured."""
    return int(spec.memory_gb * GB * dtype.itemsize / torch.float16.itemsize)


def has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@cache
def say_once(message: str) -> None:
    log.info(message)


def host_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Empty memory of the host that `device` reads and writes while the host goes on: pinned for a
    GPU. Copying between a GPU and other memory waits for everything that was launched before."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def upload(
    values: torch.Tensor | Sequence[Any], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A copy of `values` on `device`, of `dtype`; does not wait for the device."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu" or tensor.device == device:
        return tensor.to(device)
    return host_tensor(tensor.shape, dtype, device).copy_(tensor).to(device, non_blocking=True)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory. From a GPU it is there once the device has come so far."""
    if tensor.device.type == "cpu":
        return tensor
    host = host_tensor(tensor.shape, tensor.dtype, tensor.device)
    return host.copy_(tensor, non_blocking=True)


def free_unused(device: torch.device) -> None:
    """Return the memory of models that were dropped to the driver, or to the kernel."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        release_freed_memory()
