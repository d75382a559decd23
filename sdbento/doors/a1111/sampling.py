"""Samplers and noise schedules by the names that AUTOMATIC1111's clients have for them.

Source: modules/sd_samplers.py and modules/sd_schedulers.py of the web UI and of Forge.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sdbento.doors.a1111.notes import Notes
from sdbento.errors import UnknownSampler
from sdbento.samplers.names import Sampler, comparable, look_up, options_of, sigma_schedules


@dataclass(frozen=True)
class Schedule:
    """A noise schedule of the web UI, and the fields of a request that are it, or nearest to it."""

    name: str
    label: str
    sigmas: str | None = None  # None: the model's own
    timestep_spacing: str | None = None
    exact: bool = True


AUTOMATIC = Schedule("automatic", "Automatic")
SCHEDULES = (
    AUTOMATIC,
    Schedule("uniform", "Uniform", "normal"),
    Schedule("karras", "Karras", "karras"),
    Schedule("exponential", "Exponential", "exponential"),
    Schedule("polyexponential", "Polyexponential", "exponential", exact=False),
    Schedule("sgm_uniform", "SGM Uniform", "normal", "trailing"),
    Schedule("kl_optimal", "KL Optimal", "karras", exact=False),
    Schedule("align_your_steps", "Align Your Steps", "karras", exact=False),
    Schedule("align_your_steps_GITS", "Align Your Steps GITS", "karras", exact=False),
    Schedule("align_your_steps_11", "Align Your Steps 11", "karras", exact=False),
    Schedule("align_your_steps_32", "Align Your Steps 32", "karras", exact=False),
    Schedule("simple", "Simple", "normal"),
    Schedule("normal", "Normal", "normal"),
    Schedule("ddim", "DDIM", "normal", "leading", exact=False),
    Schedule("beta", "Beta", "beta"),
    Schedule("turbo", "Turbo", "normal", "trailing", exact=False),
)
_BY_NAME = {comparable(name): one for one in SCHEDULES for name in (one.name, one.label)}

# Samplers that are not offered, and the nearest that are, for what clients have saved.
_NEAREST = {
    "DPM++ 2S a": "DPM++ 2S",
    "DPM++ 2M SDE Heun": "DPM++ 2M SDE",
    "DPM++ 2M v2": "DPM++ 2M",
    "DPM fast": "DPM++ 2M",
    "DPM adaptive": "DPM++ 2M",
    "Restart": "Heun",
    "HeunPP2": "Heun",
    "Euler CFG++": "Euler",
    "Euler a CFG++": "Euler a",
    "DDIM CFG++": "DDIM",
    "DDIM Trailing": "DDIM",
    "IPNDM": "PLMS",
    "IPNDM_V": "PLMS",
}
_NEAREST_BY_NAME = {comparable(name): nearest for name, nearest in _NEAREST.items()}


def sampling_fields(sampler_name: str, scheduler: str, notes: Notes) -> dict[str, Any]:
    """The fields of a request for a sampler, whose name may end in a schedule, and a schedule.

    As in the web UI the schedule in the sampler's name goes first, and an unknown one counts as
    automatic. Raises UnknownSampler.
    """
    name, schedule = _split(sampler_name)
    sampler = _find(name, notes)
    return {
        "scheduler": sampler.name,
        **_fields(schedule or _named(scheduler, notes), sampler, notes),
    }


def _split(name: str) -> tuple[str, Schedule | None]:
    """ "DPM++ 2M Karras" is "DPM++ 2M" with Karras' schedule, and so is "dpmpp_2m_karras"."""
    spaced = name.replace("_", " ").lower()
    for schedule in SCHEDULES:
        suffix = f" {schedule.label.lower()}"
        if spaced.endswith(suffix):
            return name[: -len(suffix)], schedule
    return name, None


def _named(name: str, notes: Notes) -> Schedule:
    schedule = _BY_NAME.get(comparable(name))
    if schedule is None:
        notes.change("scheduler", name, AUTOMATIC.label)
    return schedule or AUTOMATIC


def _find(name: str, notes: Notes) -> Sampler:
    if (nearest := _NEAREST_BY_NAME.get(comparable(name))) is not None:
        notes.change("sampler", name, nearest)
        return look_up(nearest)[0]
    for known in (name, name[2:] if name.lower().startswith("k_") else name):  # "k_euler_a"
        with suppress(UnknownSampler):
            return look_up(known)[0]
    raise UnknownSampler("Sampler not found", param="sampler_name")


def _fields(schedule: Schedule, sampler: Sampler, notes: Notes) -> dict[str, Any]:
    """`sigmas` and `timestep_spacing`, where the sampler has them."""
    fields: dict[str, Any] = {}
    exact = schedule.exact
    if schedule.sigmas in sigma_schedules(sampler.scheduler):
        fields["sigmas"] = schedule.sigmas
    elif schedule.sigmas not in (None, "normal"):
        exact = False
    if schedule.timestep_spacing is not None:
        if "timestep_spacing" in options_of(sampler.scheduler):
            fields["timestep_spacing"] = schedule.timestep_spacing
        else:
            exact = False
    if not exact:
        used = " ".join(fields.values()) or AUTOMATIC.label
        notes.change("scheduler", schedule.label, used)
    return fields
