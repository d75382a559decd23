"""Loads models that tests have saved in local folders, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdbento.catalog.families import Family
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.environment import load_settings
from sdbento.models import weights
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.settings import Settings


def settings(**fields: Any) -> Settings:
    return load_settings(
        **{
            "allow_any_model": True,
            "sd_model": "shapes",
            "device": "cpu",
            "offline": True,
            **fields,
        }
    )


def resolve(path: Path) -> ModelSpec:
    return Catalog(settings()).resolve(str(path))


def resolve_controlnet(folder: Path, model: ModelSpec) -> ControlNetSpec:
    return Catalog(settings()).controlnets(model).resolve(str(folder))


def spec(family: Family, source: Path, **fields: Any) -> ModelSpec:
    return ModelSpec("mine", family, (str(source),), 64, 64, 4, 5.0, None, 0.1, **fields)


def load(spec: ModelSpec, settings: Settings) -> Pipeline:
    loaded = weights.load(spec, settings)
    assert isinstance(loaded, Pipeline)
    return loaded


def load_controlnet(spec: ControlNetSpec) -> ControlNet:
    loaded = weights.load(spec, settings())
    assert isinstance(loaded, ControlNet)
    return loaded
