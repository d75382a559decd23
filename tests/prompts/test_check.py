"""Prompts that are refused while no model is in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdbento.catalog.families import Family
from sdbento.catalog.specs import ModelSpec, catalogued
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter
from sdbento.prompts.check import check_inversions, check_second_prompt
from sdbento.prompts.inversions import Inversions

SD15, SD21, SDXL = (
    next(spec for spec in catalogued() if spec.family is family) for family in Family
)
REFINER = replace(SDXL, name="refiner", refines=True)


@pytest.fixture
def inversions(tmp_path: Path) -> Inversions:
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "ink.safetensors")
    both = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    save_file(both, tmp_path / "oil.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    return Inversions(load_settings(embeddings_dir=tmp_path))


@pytest.mark.parametrize("spec", [SDXL, REFINER], ids=str)
def test_sdxl_has_a_second_prompt(spec: ModelSpec) -> None:
    check_second_prompt(spec)


@pytest.mark.parametrize("spec", [SD15, SD21], ids=str)
@pytest.mark.parametrize("param", ["prompt_2", "negative_prompt_2"])
def test_other_models_have_no_second_prompt(spec: ModelSpec, param: str) -> None:
    with pytest.raises(InvalidParameter, match=f"{param} is for SDXL.*{spec.name}") as caught:
        check_second_prompt(spec, param=param)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a cat", SD15),
        ("(ink:1.2) BREAK a cat", SD15),
        ("oil", SDXL),
        ("oil", REFINER),
        ("a [broken:cat:0.5]", SD15),
    ],
)
def test_readable_prompts_are_accepted(text: str, spec: ModelSpec, inversions: Inversions) -> None:
    num_steps = 1  # so that the last one's edit is done before the first step
    check_inversions(text, spec, num_steps, inversions)


@pytest.mark.parametrize(
    ("text", "spec", "reason"),
    [
        ("(oil:1.2)", SD15, "oil has vectors of width .*another family"),
        ("ink", SDXL, "ink has vectors of width 768"),
        ("ink", REFINER, "ink .*another family"),
        ("a broken cat", SD15, "broken cannot be read"),
        ("a [cat:broken:0.5]", SD15, "broken cannot be read"),
    ],
)
def test_an_inversion_that_cannot_be_used_is_refused(
    text: str, spec: ModelSpec, reason: str, inversions: Inversions
) -> None:
    with pytest.raises(InvalidParameter, match=f"textual inversion {reason}") as caught:
        check_inversions(text, spec, 10, inversions)
    assert caught.value.param == "prompt"
