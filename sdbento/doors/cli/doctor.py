"""`sdbento doctor`: what this machine can run, and why, in plain words.

It changes nothing and loads no model; on a GPU it times one layer of attention. What is missing is
a finding, never an error.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import httpx
import psutil
import torch
from huggingface_hub import constants

from sdbento.access.keyring import Keyring
from sdbento.backend.pool.devices import engine_devices
from sdbento.catalog import hub
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ModelSpec
from sdbento.doors.cli.ports import listening_problem
from sdbento.doors.default_model import reason, with_default_model
from sdbento.doors.http.exposure import ADVICE, is_local
from sdbento.environment import unknown_variables
from sdbento.models import device
from sdbento.models.acceleration import attention
from sdbento.settings import Settings, SettingsError

GB = 1e9
PACKAGES = ["bentoml", "torch", "diffusers", "transformers", "peft", "safetensors", "xformers"]
HUB_TIMEOUT = 3.0
MARKS = {"good": "ok ", "note": "-- ", "bad": "NO "}


@dataclass(frozen=True)
class Finding:
    """One line: what was examined, what was found, and whether that is a problem."""

    subject: str
    text: str
    verdict: Literal["good", "note", "bad"] = "good"

    def __str__(self) -> str:
        return f"{MARKS[self.verdict]} {self.subject:<10} {self.text}"


def examine(settings: Settings, host: str, port: int) -> Iterator[Finding]:
    """All findings: Python, the machine, the network, the settings, the models."""
    yield from examine_python()
    yield from examine_machine()
    yield from examine_gpu()
    yield from examine_engines(settings)
    yield examine_disk()
    yield examine_hub(settings)
    yield examine_port(host, port)
    yield from examine_keys(settings, host)
    yield examine_any_model(settings, host)
    yield from examine_settings(settings)
    yield from examine_attention(settings)
    yield examine_default_model(settings)
    yield from examine_models(with_default_model(settings))


def examine_python() -> Iterator[Finding]:
    supported = sys.version_info[:2] in ((3, 11), (3, 12))
    text = platform.python_version() + ("" if supported else "; sdbento wants 3.11 or 3.12")
    yield Finding("Python", text, "good" if supported else "bad")
    yield Finding("packages", ", ".join(f"{name} {installed(name)}" for name in PACKAGES))


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def examine_machine() -> Iterator[Finding]:
    yield Finding("CPU", f"{torch.get_num_threads()} threads to compute with")
    memory = psutil.virtual_memory()
    yield Finding(
        "memory", f"{memory.total / GB:.1f} GB, {memory.available / GB:.1f} GB of it free"
    )


def examine_gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = "none is visible" if torch.version.cuda else "this torch is built without CUDA"
        yield Finding("GPU", f"none ({built}): images are computed on the CPU in fp32", "note")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        precisions = "fp16 and bf16" if properties.major >= 8 else "fp16, no bf16"
        if (properties.major, properties.minor) >= device.FP8_CAPABILITY:
            precisions = "fp16, bf16 and fp8"
        yield Finding(
            "GPU", f"{properties.name}, {properties.total_memory / GB:.1f} GB, {precisions}"
        )


def examine_engines(settings: Settings) -> Iterator[Finding]:
    """Which devices get an engine process each, if several are asked for."""
    if not settings.gpus:
        return
    try:
        names = [one.name for one in engine_devices(settings)]
    except SettingsError as error:
        yield Finding("engines", str(error), "bad")
        return
    several = f"one each for {', '.join(names)}"
    yield Finding("engines", several if names else "one, in the server's own process")


def examine_disk() -> Finding:
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free / GB
    text = f"{free:.0f} GB free for models in {cache}"
    return Finding("disk", text, "good" if free > 10 else "note")


def examine_hub(settings: Settings) -> Finding:
    if settings.offline or constants.HF_HUB_OFFLINE:
        return Finding("Hub", "not asked: downloads are switched off", "note")
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except httpx.HTTPError:
        return Finding("Hub", "not reachable: only models on this machine can be used", "note")
    return Finding("Hub", "reachable")


def examine_port(host: str, port: int) -> Finding:
    if (problem := listening_problem(host, port)) is None:
        return Finding("port", f"{host}:{port} is free")
    return Finding(
        "port", f"{host}:{port}: {problem}; `sdbento serve --port` takes another", "note"
    )


def examine_keys(settings: Settings, host: str) -> Iterator[Finding]:
    try:
        keyring = Keyring(settings)
    except SettingsError as error:
        yield Finding("keys", str(error), "bad")
        return
    if keyring.required:
        yield Finding("keys", f"of {', '.join(keyring.names) or 'nobody'}")
    elif is_local(host):
        yield Finding("keys", "none: whoever can use this machine may use the server", "note")
    else:
        yield Finding("keys", f"none, and the server listens on {host}: {ADVICE}", "bad")


def examine_any_model(settings: Settings, host: str) -> Finding:
    """Whether requests may name models that this server does not list, and why."""
    if settings.hub_owners:
        return Finding("any model", f"no: of the Hub, SDBENTO_HUB_OWNERS={settings.hub_owners}")
    if (allowed := settings.allow_any_model) is not None:
        why = f"SDBENTO_ALLOW_ANY_MODEL={str(allowed).lower()}"
    else:
        allowed = is_local(host)
        others = "only this machine" if allowed else "others"
        why = f"SDBENTO_ALLOW_ANY_MODEL is unset, and {others} can reach the server on {host}"
    is_open = allowed and not is_local(host)
    return Finding(
        "any model", f"{'yes' if allowed else 'no'}: {why}", "note" if is_open else "good"
    )


def examine_settings(settings: Settings) -> Iterator[Finding]:
    for variable, value, default in settings.changed():
        yield Finding("setting", f"{variable}={value} (default {default})")
    for variable in unknown_variables():
        yield Finding("setting", f"{variable} is set, but no setting has that name", "note")
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not on_gpu:
        yield Finding("setting", "SDBENTO_DEVICE=cuda cannot be honoured: there is no GPU", "bad")
    if settings.precision != "fp32" and not on_gpu:
        text = f"PRECISION={settings.precision} cannot be honoured on a CPU: fp32 is used"
        yield Finding("setting", text, "note")
    if settings.enable_xformers and (not on_gpu or installed("xformers") == "not installed"):
        why = "it is not installed" if on_gpu else "there is no GPU"
        text = f"ENABLE_XFORMERS=true has no effect, {why}: torch's own attention is used"
        yield Finding("setting", text, "note")


def examine_attention(settings: Settings) -> Iterator[Finding]:
    try:
        where = device.choose_device(settings)
        dtype = device.choose_dtype(settings, where)
    except SettingsError:  # `examine_models` tells
        return
    if where.type == "cpu":
        yield Finding("attention", "torch's own (SDPA), the only one for a CPU")
        return
    try:
        layers = attention.typical_layers(where, dtype)
        fastest = attention.fastest(layers, settings, where, dtype)
    except Exception as error:  # the GPU may be full, or broken
        yield Finding("attention", f"cannot be measured: {error}", "bad")
        return
    text = f"{fastest.name} is the fastest for SDXL's largest layers; every model measures its own"
    yield Finding("attention", text)


def examine_default_model(settings: Settings) -> Finding:
    """Which model answers requests that name none, and by what rule."""
    return Finding("default", f"{with_default_model(settings).sd_model}: {reason(settings)}")


def examine_models(settings: Settings) -> Iterator[Finding]:
    try:
        dtype = device.choose_dtype(settings, device.choose_device(settings))
    except SettingsError as error:
        yield Finding("models", f"none can be loaded: {error}", "bad")
        return
    limit = device.memory_budget_gb(settings)
    yield Finding(
        "models",
        f"may take {limit:.1f} GB of memory together, in {str(dtype).removeprefix('torch.')}",
    )
    for spec in Catalog(settings).list():
        need = device.memory_need(spec, dtype) / GB
        place = "on this machine" if is_here(spec, dtype) else "not downloaded yet"
        text = f"{spec.name}: {place}, needs {need:g} GB"
        if need <= limit:
            yield Finding("model", text)
        else:
            yield Finding("model", f"{text}, more than it may take", "note")


def is_here(spec: ModelSpec, dtype: torch.dtype) -> bool:
    try:
        hub.fetch(spec, dtype is not torch.float32, offline=True)
    except Exception:  # whatever the reason is, it would have to be downloaded
        return False
    return True
