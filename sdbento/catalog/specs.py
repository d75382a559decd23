"""Specs of models, ControlNets and LoRAs, and those of the catalogue, configs/models.yaml.

Knows nothing of how a name is looked up, of loading or of devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import yaml

from sdbento.catalog.families import Family, PredictionType

PACKAGE = Path(__file__).parents[1]
CATALOG_FILE = PACKAGE.parent / "configs" / "models.yaml"  # also where a wheel installs it
BUNDLED = "bundled:"


@dataclass(frozen=True)
class ModelSpec:
    """One model: where it comes from, and its defaults for what a request does not say.

    `sources`: Hub ids in order of preference, or one absolute path of a diffusers folder or a
    single .safetensors file.
    """

    param: ClassVar[str] = "model"  # the request field that names it

    name: str
    family: Family
    sources: tuple[str, ...]
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str | None  # None: the model's own scheduler
    memory_gb: float  # weights and activations in fp16
    preview_decoder: str | None = None  # the folder of an AutoencoderTiny
    prediction_type: PredictionType | None = None  # None: as the scheduler's configuration says
    zero_snr: bool = False
    aliases: tuple[str, ...] = ()
    inpaints: bool = False  # its UNet also reads the mask and the masked image
    refines: bool = False  # the SDXL refiner: one text encoder, and an aesthetic score

    def __str__(self) -> str:
        return f"model {self.name}"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def latent_rgb(self) -> list[list[float]]:
        """Latents to RGB, [5, 3]: a row for each latent channel, then the bias."""
        rows: list[list[float]] = document()["families"][self.family]["latent_rgb"]
        return rows

    @property
    def key(self) -> str:
        """Unique among models and ControlNets."""
        return self.name


@dataclass(frozen=True)
class ControlNetSpec:
    """One ControlNet (Zhang et al. 2023): where it comes from and which models it is for.

    `sources`: Hub ids in order of preference, or the absolute path of one diffusers folder.
    """

    param: ClassVar[str] = "controlnet.type"

    name: str
    family: Family
    sources: tuple[str, ...]
    memory_gb: float  # weights and activations in fp16

    def __str__(self) -> str:
        return f"ControlNet {self.name}"

    @property
    def key(self) -> str:
        return f"controlnet:{self.name}"


Spec = ModelSpec | ControlNetSpec


@dataclass(frozen=True)
class LoraSpec:
    """One LoRA of the catalogue (Hu et al. 2021)."""

    name: str
    family: Family
    source: str  # the absolute path of a .safetensors file, or a Hub id
    aliases: tuple[str, ...] = ()
    model: str | None = None  # the only one of its family that it fits; None: any

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@cache
def catalogued() -> tuple[ModelSpec, ...]:
    """The models of configs/models.yaml."""
    return tuple(_model(**entry) for entry in document()["models"])


@cache
def catalogued_loras() -> tuple[LoraSpec, ...]:
    """The LoRAs of configs/models.yaml; the file of a bundled one may be missing."""
    return tuple(_lora(**entry) for entry in document()["loras"])


@cache
def catalogued_controlnets() -> dict[str, dict[str, ControlNetSpec]]:
    """The ControlNets of configs/models.yaml: by the family or model they are for, then by type."""
    families: dict[str, Family] = {family: family for family in Family}
    families |= {spec.name: spec.family for spec in catalogued()}
    return {
        owner: {kind: _controlnet(families[owner], **entry) for kind, entry in types.items()}
        for owner, types in document()["controlnets"].items()
    }


def controlnets_for(model: ModelSpec) -> dict[str, ControlNetSpec]:
    """The catalogue's ControlNets by type: the model's own, if it has any, else its family's."""
    listed = catalogued_controlnets()
    return listed.get(model.name) or listed.get(model.family) or {}


def family_configs(family: Family) -> ModelSpec:
    """The model whose configurations and tokenizers complete single files of that family."""
    name = document()["families"][family]["configs"]
    return next(spec for spec in catalogued() if spec.name == name)


def defaults(family: Family) -> dict[str, Any]:
    """Fields of a model of that family that its entry or its files do not state."""
    given = document()["families"][family]
    chosen = ("num_inference_steps", "guidance_scale", "memory_gb")
    return {"sampler": None, **{field: given[field] for field in chosen}}


@cache
def document() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(CATALOG_FILE.read_text(encoding="utf-8"))
    return read


def _model(
    *, family: str, sources: list[str], aliases: tuple[str, ...] = (), **fields: Any
) -> ModelSpec:
    if "preview_decoder" in fields:
        fields["preview_decoder"] = _locate(fields["preview_decoder"])
    return ModelSpec(
        family=Family(family),
        sources=tuple(map(_locate, sources)),
        aliases=tuple(aliases),
        **{**defaults(Family(family)), **fields},
    )


def _controlnet(family: Family, *, sources: list[str], memory_gb: float) -> ControlNetSpec:
    name = sources[0].removeprefix(BUNDLED)
    return ControlNetSpec(name, family, tuple(map(_locate, sources)), memory_gb)


def _lora(
    *, name: str, family: str, source: str, aliases: tuple[str, ...] = (), model: str | None = None
) -> LoraSpec:
    return LoraSpec(name, Family(family), _locate(source), tuple(aliases), model)


def _locate(source: str) -> str:
    """`bundled:PATH` lies in the package; anything else is a Hub id."""
    path = source.removeprefix(BUNDLED)
    return source if path == source else str(PACKAGE / "bundled" / path)
