"""A loader of models and ControlNets that loads nothing, and specs for it."""

from __future__ import annotations

import threading

import torch

from sdbento.catalog.families import Family
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.models.pipeline import ControlNet, Pipeline, Resident

GB = 10**9
SOON = 10.0  # seconds that a busy machine may take for what should be instant


def spec(name: str, gigabytes: float = 1.0) -> ModelSpec:
    """On a CPU, which computes in fp32, a model that needs `gigabytes`."""
    return ModelSpec(name, Family.SD15, (), 64, 64, 4, 5.0, None, gigabytes / 2)


def control(name: str, gigabytes: float = 1.0) -> ControlNetSpec:
    return ControlNetSpec(name, Family.SD15, (), gigabytes / 2)


class FakeLoader:
    """Returns a stand-in at once, or when `gate` is set; remembers what it was asked for."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[BaseException] = []
        self.failing: dict[str, BaseException] = {}
        self.sizes: dict[str, float] = {}

    def __call__(self, wanted: ModelSpec | ControlNetSpec) -> Resident:
        self.loaded.append(wanted.name)
        assert self.gate.wait(SOON)
        if self.errors:
            raise self.errors.pop(0)
        if wanted.name in self.failing:
            raise self.failing[wanted.name]
        nbytes = int(self.sizes.get(wanted.name, 2 * wanted.memory_gb) * GB)
        cpu, fp32 = torch.device("cpu"), torch.float32
        if isinstance(wanted, ControlNetSpec):
            return ControlNet(wanted, torch.nn.Linear(2, 2), cpu, fp32, nbytes)
        return Pipeline(wanted, FakePipe(), cpu, fp32, fp32, nbytes)


class FakePipe:
    def __init__(self) -> None:
        self.components = {"unet": torch.nn.Linear(2, 2)}
