"""Which devices get an engine each: what SDBENTO_GPUS asks for, as far as this machine has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdbento.models.device import memory_budget_gb
from sdbento.process.threads import num_cores
from sdbento.settings import Settings, SettingsError


@dataclass(frozen=True)
class EngineDevice:
    """A device for an engine process of its own. `gpu`: its number among those that this process
    sees; None: a share of the CPU. `settings`: those of the engine process."""

    name: str
    gpu: int | None
    settings: Settings


def engine_devices(settings: Settings) -> list[EngineDevice]:
    """One for each engine process; none where one engine in this process is enough.

    Raises SettingsError where there are fewer GPUs than asked for.
    """
    kind, _, number = settings.gpus.partition(":")
    if kind == "cpu":
        return _shares_of_cpu(settings, int(number))
    gpus = _gpus(settings)
    if len(gpus) < 2:
        return []
    own = settings.model_copy(update={"gpus": "", "device": "cuda"})
    return [EngineDevice(f"GPU {gpu}", gpu, own) for gpu in gpus]


def _gpus(settings: Settings) -> list[int]:
    """Numbers of GPUs."""
    asked = settings.gpus
    if not asked:
        return []
    visible = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if asked == "all":
        return list(range(visible))
    gpus = [int(gpu) for gpu in asked.split(",")] if "," in asked else list(range(int(asked)))
    if len(gpus) > 1 and max(gpus) >= visible:
        seen = "no GPU" if not visible else "1 GPU" if visible == 1 else f"{visible} GPUs"
        raise SettingsError(f"SDBENTO_GPUS={asked!r}: torch sees {seen}")
    return gpus


def _shares_of_cpu(settings: Settings, number: int) -> list[EngineDevice]:
    if number < 2:
        return []
    on_cpu = settings.model_copy(update={"gpus": "", "device": "cpu"})
    share = {
        "num_threads": settings.num_threads or max(1, num_cores() // number),
        "memory_gb": settings.memory_gb or memory_budget_gb(on_cpu) / number,
    }
    own = on_cpu.model_copy(update=share)
    return [EngineDevice(f"CPU {i + 1} of {number}", None, own) for i in range(number)]
