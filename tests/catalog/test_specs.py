"""The catalogue, configs/models.yaml, is complete and consistent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdbento.catalog.families import Family
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import (
    ModelSpec,
    catalogued,
    catalogued_controlnets,
    catalogued_loras,
    family_configs,
)
from sdbento.environment import load_settings
from sdbento.samplers.names import canonical_name


def make(**settings: Any) -> Catalog:
    return Catalog(load_settings(**{"sd_model": "shapes", "offline": True, **settings}))


def test_every_entry_is_complete() -> None:
    for spec in catalogued():
        assert spec.sources
        assert spec.width % 64 == spec.height % 64 == 0
        assert 1 <= spec.num_inference_steps <= 50
        assert 0 < spec.memory_gb < 24
        assert np.shape(spec.latent_rgb) == (5, 3)
        if spec.sampler is not None:
            canonical_name(spec.sampler)


def test_no_two_entries_share_a_name_or_a_source() -> None:
    names = [name for spec in catalogued() for name in {*spec.names, *spec.sources}]
    assert len(names) == len(set(names))


def test_every_family_has_configurations_for_its_single_files() -> None:
    assert {family_configs(family).family for family in Family} == set(Family)


def test_a_spec_without_a_projection_takes_its_familys() -> None:
    spec = ModelSpec("x", Family.SDXL, (), 64, 64, 4, 5.0, None, 0.1)
    assert spec.latent_rgb == make().resolve("sdxl").latent_rgb


@pytest.mark.parametrize(
    ("name", "inpaints", "refines"),
    [
        ("sdxl-refiner", False, True),
        ("sdxl-inpaint", True, False),
        ("sd21-inpaint", True, False),
        ("sd15-inpaint", True, False),
        ("sdxl", False, False),
        ("shapes", False, False),
    ],
)
def test_the_catalogue_states_what_a_model_is_for(name: str, inpaints: bool, refines: bool) -> None:
    spec = make().resolve(name)
    assert (spec.inpaints, spec.refines) == (inpaints, refines)


# ControlNets

TYPES = ["canny", "depth", "openpose", "scribble", "softedge", "lineart", "mlsd", "normal", "seg"]
TYPES += ["tile", "inpaint"]


def test_sd15_has_every_type_and_each_family_the_commonest() -> None:
    listed = catalogued_controlnets()
    assert [*listed["sd15"]] == TYPES
    for family in Family:
        assert {"canny", "depth", "openpose"} <= {*listed[family]} <= {*TYPES}
        assert {spec.family for spec in listed[family].values()} == {family}


def test_no_controlnet_shares_its_key_with_another_controlnet_or_a_model() -> None:
    specs = [spec for specs in catalogued_controlnets().values() for spec in specs.values()]
    keys = [*(spec.key for spec in specs), *(spec.key for spec in catalogued())]
    assert len(keys) == len(set(keys))


# LoRAs


def test_the_embedded_models_loras_are_listed_whether_or_not_they_are_there() -> None:
    loras = {name: lora for lora in catalogued_loras() for name in lora.names}
    of_shapes = {"outline", "shapes-outline", "checker", "shapes-checker"}
    assert {*loras} == {"emoji-outline", "emoji-pixel-art"} | of_shapes
    for lora in catalogued_loras():
        assert lora.family is make().resolve("shapes").family is make().resolve("emoji").family
        file = Path(lora.source)
        assert file.is_absolute() and file.name == "pytorch_lora_weights.safetensors"
        assert file.parent.name in lora.names
        assert lora.model == file.parent.name.partition("-")[0]
