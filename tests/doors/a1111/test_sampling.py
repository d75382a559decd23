"""Samplers and schedules of the web UI as fields of a request."""

from __future__ import annotations

from typing import Any

import pytest

from sdbento.doors.a1111.notes import Notes
from sdbento.doors.a1111.sampling import sampling_fields
from sdbento.errors import UnknownSampler


def fields(sampler: str, scheduler: str = "automatic") -> tuple[dict[str, Any], list[str]]:
    notes = Notes()
    return sampling_fields(sampler, scheduler, notes), notes.changed


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        ("Euler a", "automatic", {"scheduler": "Euler a"}),
        ("Euler a", "Automatic", {"scheduler": "Euler a"}),
        ("euler_a", "", {"scheduler": "Euler a"}),
        ("k_euler_a", "automatic", {"scheduler": "Euler a"}),
        ("PLMS", "automatic", {"scheduler": "PLMS"}),
        ("UniPC", "automatic", {"scheduler": "UniPC"}),
        ("LCM", "automatic", {"scheduler": "LCM"}),
        ("DDIM", "normal", {"scheduler": "DDIM", "sigmas": "normal"}),
        ("DPM++ 2M", "karras", {"scheduler": "DPM++ 2M", "sigmas": "karras"}),
        ("DPM++ 2M", "Karras", {"scheduler": "DPM++ 2M", "sigmas": "karras"}),
        ("DPM++ 2M Karras", "automatic", {"scheduler": "DPM++ 2M", "sigmas": "karras"}),
        ("dpmpp_2m_karras", "automatic", {"scheduler": "DPM++ 2M", "sigmas": "karras"}),
        ("dpm++2m", "beta", {"scheduler": "DPM++ 2M", "sigmas": "beta"}),
        ("DPM++ 2M SDE Exponential", "x", {"scheduler": "DPM++ 2M SDE", "sigmas": "exponential"}),
        ("LMS Karras", "automatic", {"scheduler": "LMS", "sigmas": "karras"}),
        ("Euler", "uniform", {"scheduler": "Euler", "sigmas": "normal"}),
        ("Euler", "Simple", {"scheduler": "Euler", "sigmas": "normal"}),
        (
            "Euler",
            "SGM Uniform",
            {"scheduler": "Euler", "sigmas": "normal", "timestep_spacing": "trailing"},
        ),
    ],
)
def test_what_there_is_is_taken_without_a_word(
    sampler: str, scheduler: str, expected: dict[str, Any]
) -> None:
    assert fields(sampler, scheduler or "automatic") == (expected, [])


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected", "change"),
    [
        ("DPM++ 2S a", "automatic", "DPM++ 2S", "sampler DPM++ 2S a -> DPM++ 2S"),
        ("DPM++ 2S a Karras", "automatic", "DPM++ 2S", "sampler DPM++ 2S a -> DPM++ 2S"),
        ("DPM fast", "automatic", "DPM++ 2M", "sampler DPM fast -> DPM++ 2M"),
        ("DPM adaptive", "automatic", "DPM++ 2M", "sampler DPM adaptive -> DPM++ 2M"),
        ("DPM++ 2M SDE Heun", "automatic", "DPM++ 2M SDE", "sampler DPM++ 2M SDE Heun -> "),
        ("Restart", "automatic", "Heun", "sampler Restart -> Heun"),
        ("DDIM CFG++", "automatic", "DDIM", "sampler DDIM CFG++ -> DDIM"),
        ("DDIM Karras", "automatic", "DDIM", "scheduler Karras -> Automatic"),
        ("Euler a", "karras", "Euler a", "scheduler Karras -> Automatic"),
        ("Euler", "kl_optimal", "Euler", "scheduler KL Optimal -> karras"),
        ("Euler", "Align Your Steps", "Euler", "scheduler Align Your Steps -> karras"),
        ("Euler", "polyexponential", "Euler", "scheduler Polyexponential -> exponential"),
        ("Euler", "turbo", "Euler", "scheduler Turbo -> normal trailing"),
        ("Euler", "no such", "Euler", "scheduler no such -> Automatic"),
    ],
)
def test_what_there_is_not_becomes_the_nearest_and_that_is_said(
    sampler: str, scheduler: str, expected: str, change: str
) -> None:
    found, changes = fields(sampler, scheduler)
    assert found["scheduler"] == expected
    assert changes and changes[0].startswith(change)


@pytest.mark.parametrize("sampler", ["no such", "Karras", " Karras", "k_", "\ud800", "x" * 500])
def test_an_unknown_sampler_is_refused_as_the_web_ui_does(sampler: str) -> None:
    with pytest.raises(UnknownSampler, match="Sampler not found"):
        fields(sampler)
