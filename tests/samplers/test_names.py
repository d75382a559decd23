"""Names of samplers."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

from sdbento.errors import UnknownSampler, UnsupportedSampler
from sdbento.samplers.names import SamplerInfo, canonical_name, list_samplers

SAMPLERS = {info.name: info for info in list_samplers()}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("EulerDiscreteScheduler", "Euler"),
        ("EulerDiscrete", "Euler"),
        ("euler", "Euler"),
        ("Euler a", "Euler a"),
        ("EULER A", "Euler a"),
        ("euler_ancestral", "Euler a"),
        ("EulerAncestralDiscreteScheduler", "Euler a"),
        ("DPM++ 2M", "DPM++ 2M"),
        ("dpmpp_2m", "DPM++ 2M"),
        ("dpmpp_2m karras", "DPM++ 2M Karras"),
        ("DPM++ 2M SDE Karras", "DPM++ 2M SDE Karras"),
        ("DPM++ 2M Exponential", "DPM++ 2M Exponential"),
        ("DPM++ SDE Karras", "DPM++ SDE Karras"),
        ("DPM-Solver", "DPM-Solver"),
        ("DPMSolverMultistepScheduler", "DPM-Solver"),
        ("DPMSolverMultistep", "DPM-Solver"),
        ("DPMSolverSinglestepScheduler", "DPM-Solver Singlestep"),
        ("DPM2", "DPM2"),
        ("dpm_2", "DPM2"),
        ("DPM2 a Karras", "DPM2 a Karras"),
        ("KDPM2DiscreteScheduler", "DPM2"),
        ("LMS Karras", "LMS Karras"),
        ("PLMS", "PLMS"),
        ("PNDMScheduler", "PNDM"),
        ("UniPCMultistepScheduler", "UniPC"),
        ("uni_pc", "UniPC"),
        ("DEISMultistepScheduler", "DEIS"),
        ("ddim", "DDIM"),
        ("SASolverScheduler", "SA-Solver"),
        ("Heun Beta", "Heun Beta"),
    ],
)
def test_a_sampler_name_may_be_written_in_many_ways(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


def test_every_listed_name_and_alias_is_understood() -> None:
    for info in SAMPLERS.values():
        assert all(canonical_name(alias) == info.name for alias in (info.name, *info.aliases))


def test_every_scheduler_that_diffusers_calls_compatible_is_offered_but_one() -> None:
    compatible = diffusers.schedulers.scheduling_utils.KarrasDiffusionSchedulers
    offered = {info.scheduler for info in SAMPLERS.values()}
    assert {scheduler.name for scheduler in compatible} - offered == {"DPMSolverSDEScheduler"}
    with pytest.raises(UnsupportedSampler, match="Brownian"):
        canonical_name("DPMSolverSDEScheduler")


@pytest.mark.parametrize("name", ["DPM++ 2S a", "DPM++ 2S a Karras", "DPM fast", "DPMSolverSDE"])
def test_names_that_diffusers_cannot_serve_are_refused_with_an_alternative(name: str) -> None:
    with pytest.raises(UnsupportedSampler, match=r"DPM\+\+ 2[MS]"):
        canonical_name(name)


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(UnknownSampler, match="Euler a") as caught:
        canonical_name("Eular a")
    assert caught.value.param == "scheduler"
    with pytest.raises(UnknownSampler, match="GET /samplers"):
        canonical_name("???")


def test_the_documentation_lists_the_samplers_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows[2:] == [documented(info) for info in SAMPLERS.values()]


def documented(info: SamplerInfo) -> str:
    aliases = ", ".join(f"`{alias}`" for alias in info.aliases if alias != info.scheduler)
    noise = "yes" if info.stochastic else ""
    return f"| {info.name} | `{info.scheduler}` | {aliases} | {', '.join(info.sigmas)} | {noise} |"
