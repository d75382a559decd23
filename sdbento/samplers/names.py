"""Samplers by the names people use, and the diffusers schedulers they stand for.

A request names a sampler as diffusers does ("EulerDiscreteScheduler"), as AUTOMATIC1111's web UI
does ("DPM++ 2M Karras"), as ComfyUI does ("dpmpp_2m") or as RunPod's SDXL worker does ("K_EULER").
The names map as in diffusers' own table (docs/source/en/api/schedulers/overview.md).

Makes no scheduler, and knows nothing of requests or models.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import diffusers

from sdbento.errors import InvalidParameter, UnknownSampler, UnsupportedSampler, nearest_names

_NAMED_SIGMAS = ("karras", "exponential", "beta")


@dataclass(frozen=True)
class SamplerInfo:
    """One sampler as GET /samplers shows it."""

    name: str
    aliases: tuple[str, ...]
    scheduler: str  # diffusers class
    sigmas: tuple[str, ...]
    stochastic: bool  # draws noise at each step; DDIM and TCD do so only for eta > 0


@dataclass(frozen=True)
class Sampler:
    """A row of the table below: a name, and the diffusers class with the options it stands for."""

    name: str
    scheduler: str
    aliases: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # those that the name implies
    stochastic: bool = False


_SDE = "sde-dpmsolver++"
_SAMPLERS = (
    Sampler("DDIM", "DDIMScheduler"),
    Sampler("DDIM Parallel", "DDIMParallelScheduler"),
    Sampler("DDPM", "DDPMScheduler", stochastic=True),
    Sampler("DDPM Parallel", "DDPMParallelScheduler", stochastic=True),
    Sampler("PNDM", "PNDMScheduler"),
    Sampler("PLMS", "PNDMScheduler", (), {"skip_prk_steps": True}),
    Sampler("LMS", "LMSDiscreteScheduler", ("KLMS",)),
    Sampler("Euler", "EulerDiscreteScheduler", ("K_EULER",)),
    Sampler(
        "Euler a",
        "EulerAncestralDiscreteScheduler",
        ("euler_ancestral", "K_EULER_ANCESTRAL"),
        stochastic=True,
    ),
    Sampler("Heun", "HeunDiscreteScheduler"),
    Sampler("DPM2", "KDPM2DiscreteScheduler", ("dpm_2",)),
    Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", ("dpm_2_ancestral",), stochastic=True),
    Sampler("DPM-Solver", "DPMSolverMultistepScheduler", ("DPM-Solver++",)),
    Sampler(
        "DPM++ 2M",
        "DPMSolverMultistepScheduler",
        ("dpmpp_2m",),
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    Sampler(
        "DPM++ 2M SDE",
        "DPMSolverMultistepScheduler",
        ("dpmpp_2m_sde",),
        {"algorithm_type": _SDE, "solver_order": 2},
        stochastic=True,
    ),
    Sampler(
        "DPM++ 3M",
        "DPMSolverMultistepScheduler",
        ("dpmpp_3m",),
        {"algorithm_type": "dpmsolver++", "solver_order": 3},
    ),
    Sampler(
        "DPM++ 3M SDE",
        "DPMSolverMultistepScheduler",
        ("dpmpp_3m_sde",),
        {"algorithm_type": _SDE, "solver_order": 3},
        stochastic=True,
    ),
    Sampler("DPM-Solver Singlestep", "DPMSolverSinglestepScheduler"),
    Sampler(
        "DPM++ 2S",
        "DPMSolverSinglestepScheduler",
        ("dpmpp_2s",),
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    Sampler(
        "DPM++ SDE",
        "DPMSolverSinglestepScheduler",
        ("dpmpp_sde",),
        {"algorithm_type": _SDE, "solver_order": 2},
        stochastic=True,
    ),
    Sampler("UniPC", "UniPCMultistepScheduler", ("uni_pc",)),
    Sampler("DEIS", "DEISMultistepScheduler"),
    Sampler("SA-Solver", "SASolverScheduler", ("sa_solver",), stochastic=True),
    Sampler("LCM", "LCMScheduler", stochastic=True),
    Sampler("TCD", "TCDScheduler"),
    Sampler("EDM Euler", "EDMEulerScheduler"),
    Sampler("EDM DPM++ 2M", "EDMDPMSolverMultistepScheduler"),
)

_TWO_S = "diffusers has no such sampler; the nearest is DPM++ 2S"
_REFUSED = {
    "DPMSolverSDEScheduler": "its noise comes from a Brownian tree and not from the request's seed "
    "alone; use DPM++ SDE or DPM++ 2M SDE",
    "DPM++ 2S a": _TWO_S,
    "dpmpp_2s_ancestral": _TWO_S,
    "DPM fast": "diffusers has no such sampler; use DPM++ 2M",
    "DPM adaptive": "its number of steps is not known in advance; use DPM++ 2M",
}


def canonical_name(name: str) -> str:
    """The one spelling of a sampler's name: "dpmpp_2m karras" is "DPM++ 2M Karras".

    Raises UnknownSampler with the nearest names, and UnsupportedSampler for one that is refused.
    """
    sampler, sigmas = look_up(name)
    return sampler.name if sigmas is None else f"{sampler.name} {sigmas.capitalize()}"


def list_samplers() -> list[SamplerInfo]:
    """All samplers. The forms "... Karras", "... Exponential" and "... Beta" are not listed: each
    sampler's `sigmas` says which it has."""
    return [
        SamplerInfo(
            name=sampler.name,
            aliases=(*sampler.aliases, *_class_names(sampler)),
            scheduler=sampler.scheduler,
            sigmas=tuple(sigma_schedules(sampler.scheduler)),
            stochastic=sampler.stochastic,
        )
        for sampler in _SAMPLERS
    ]


def look_up(name: str) -> tuple[Sampler, str | None]:
    """The sampler that a name means, and the sigmas that the name ends in, if any."""
    key = comparable(name)
    if key in _BY_KEY:
        return _BY_KEY[key], None
    for sigmas in _NAMED_SIGMAS:
        sampler = _BY_KEY.get(key.removesuffix(sigmas))
        if sampler is not None:
            check_sigmas(sampler, sigmas, UnsupportedSampler, "scheduler")
            return sampler, sigmas
    for refused, reason in _REFUSED.items():
        if key.startswith(comparable(refused).removesuffix("scheduler")):
            raise UnsupportedSampler(f"{name} is not offered: {reason}", param="scheduler")
    raise UnknownSampler(f"no sampler is called {name!r}{_nearest(key)}", param="scheduler")


def comparable(name: str) -> str:
    """A name without what does not matter: case, spaces and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def _nearest(key: str) -> str:
    names = {_BY_KEY[near].name: None for near in nearest_names(key, _BY_KEY, cutoff=0.6)}
    return f"; the nearest are {', '.join(names)}" if names else "; GET /samplers lists them all"


def _class_names(sampler: Sampler) -> tuple[str, ...]:
    """The class's name and its short forms, for the sampler that is the class without options."""
    if sampler.options:
        return ()
    short = sampler.scheduler.removesuffix("Scheduler")
    names = (sampler.scheduler, short, short.removesuffix("Discrete"))
    return tuple(
        dict.fromkeys(name for name in names if comparable(name) != comparable(sampler.name))
    )


_BY_KEY = {
    comparable(name): sampler
    for sampler in _SAMPLERS
    for name in (sampler.name, *sampler.aliases, *_class_names(sampler))
}


@lru_cache
def options_of(scheduler: str) -> frozenset[str]:
    """The options that the configuration of a diffusers class can have."""
    signature = inspect.signature(getattr(diffusers, scheduler).__init__)
    return frozenset(signature.parameters) - {"self"}


def sigma_schedules(scheduler: str) -> dict[str, dict[str, Any]]:
    """The sigma schedules that a diffusers class has, with the options that choose each."""
    options = options_of(scheduler)
    if "sigma_schedule" in options:  # the EDM classes
        return {name: {"sigma_schedule": name} for name in ("karras", "exponential")}
    flags = {name: f"use_{name}_sigmas" for name in _NAMED_SIGMAS}
    off = {flag: False for flag in (*flags.values(), "use_lu_lambdas") if flag in options}
    named = {name: {**off, flag: True} for name, flag in flags.items() if flag in options}
    return {"normal": off, **named}


def check_sigmas(sampler: Sampler, sigmas: str, error: type[InvalidParameter], param: str) -> None:
    allowed = sigma_schedules(sampler.scheduler)
    if sigmas not in allowed:
        raise error(
            f"{sampler.name} has no {sigmas!r} sigmas; it has {', '.join(allowed)}", param=param
        )
