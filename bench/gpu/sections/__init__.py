"""The sections in the order of their value: if time runs out, the last ones are left out.

This module imports no torch; a section's own module is imported where the section runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.gpu.bench import Bench


@dataclass(frozen=True)
class Options:
    """The options of the command line, for every section."""

    toy: bool = False
    precision: str = "fp16"
    max_images: int = 8

    def as_toy(self) -> Options:
        return replace(self, toy=True)


@dataclass(frozen=True)
class Section:
    """`weight`: seconds that it is expected to need on an H100, with some to spare."""

    name: str
    weight: float
    target: str  # module:function
    title: str
    models: tuple[str, ...] = ()

    @property
    def function(self) -> Callable[[Bench], None]:
        module, _, function = self.target.partition(":")
        measure = getattr(import_module(f"{__name__}.{module}"), function)

        def run(bench: Bench) -> None:
            for model in self.models:
                measure(bench, model)
            if not self.models:
                measure(bench)

        return run


_SDXL, _SD15 = ("sdxl",), ("sd15",)
_ALL = (
    Section("versions", 25, "versions:measure", "What the machine is, and that the engine runs"),
    Section("kernels", 10, "kernels:measure", "The server's own kernels"),
    Section("correctness", 80, "correctness:measure", "Images of `shapes`, against stock fp32"),
    Section("eager", 60, "eager:measure", "SDXL: a step of stock and engine", _SDXL),
    Section("graphs", 35, "graphs:measure", "SDXL: CUDA graphs without a compiler", _SDXL),
    Section("compiled", 80, "compiled:measure", "SDXL: compiled, under CUDA graphs", _SDXL),
    Section("fp8", 80, "fp8:measure", "SDXL: linear layers in fp8", _SDXL),
    Section("sd15", 20, "graphs:eager_and_graphs", "SD 1.5: a step, with CUDA graphs too", _SD15),
    Section("serving", 90, "serving:online", "SD 1.5: mixed requests that arrive by chance", _SD15),
    Section("offline", 80, "serving:offline", "SDXL: many images at once, decoded too", _SDXL),
    Section("vae", 25, "vae:measure", "SDXL: latents to images", _SDXL),
    Section("ceilings", 25, "ceilings:measure", "What the device can do at best"),
    Section("loading", 30, "loading:measure", "SDXL: what comes beside the steps", _SDXL),
    Section("sd15-compiled", 70, "compiled:measure", "SD 1.5: compiled, under CUDA graphs", _SD15),
)
# They fail on purpose, to check that no other section fails with them.
_FAULTS = (
    Section("fault-raise", 10, "faults:fail", "Raises"),
    Section("fault-crash", 10, "faults:crash", "Is killed by a signal"),
    Section("fault-hang", 4, "faults:hang", "Never ends"),
)
DEFAULT = tuple(section.name for section in _ALL)
TOY = tuple(name for name in DEFAULT if name != "sd15-compiled")  # "compiled" covers its code
SECTIONS = {section.name: section for section in (*_ALL, *_FAULTS)}
