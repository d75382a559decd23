"""Samplers by the names people use, and the diffusers schedulers they stand for.

    name -> canonical_name -> build_scheduler (the real thing) -> compile_table (see `step_table`)

A request names a sampler as diffusers does ("EulerDiscreteScheduler"), as AUTOMATIC1111's web UI
does ("DPM++ 2M Karras") or as ComfyUI does ("dpmpp_2m"). The names map as in diffusers' own table
(docs/source/en/api/schedulers/overview.md). What the name leaves open, the model's own scheduler
configuration decides.

Knows nothing of requests, UNets or devices.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import re
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import diffusers

from sdbento.errors import InvalidParameter, SDBentoError, UnknownSampler, UnsupportedSampler
from sdbento.samplers.step_table import WHOLE, StepTable, Window, read_table

CACHE_SIZE = 256  # tables; one of 50 steps takes 10 kB or less
SPACINGS = ("leading", "trailing", "linspace")
_NAMED_SIGMAS = ("karras", "exponential", "beta")


@dataclass(frozen=True)
class SamplerSpec:
    """What a request asks for. None: as the name says, else as the model's configuration says."""

    name: str
    sigmas: str | None = None  # "normal", "karras", "exponential", "beta"
    timestep_spacing: str | None = None  # "leading", "trailing", "linspace"
    eta: float = 0.0  # noise of DDIM and TCD; the other schedulers' step does not take it


@dataclass(frozen=True)
class SamplerInfo:
    """One sampler as GET /samplers shows it."""

    name: str
    aliases: tuple[str, ...]
    scheduler: str  # diffusers class
    sigmas: tuple[str, ...]
    stochastic: bool  # draws noise at each step; DDIM and TCD do so only for eta > 0


@dataclass(frozen=True)
class _Sampler:
    name: str
    scheduler: str
    aliases: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # what the name itself says
    stochastic: bool = False


_SDE = "sde-dpmsolver++"
_SAMPLERS = (
    _Sampler("DDIM", "DDIMScheduler"),
    _Sampler("DDIM Parallel", "DDIMParallelScheduler"),
    _Sampler("DDPM", "DDPMScheduler", stochastic=True),
    _Sampler("DDPM Parallel", "DDPMParallelScheduler", stochastic=True),
    _Sampler("PNDM", "PNDMScheduler"),
    _Sampler("PLMS", "PNDMScheduler", (), {"skip_prk_steps": True}),
    _Sampler("LMS", "LMSDiscreteScheduler"),
    _Sampler("Euler", "EulerDiscreteScheduler"),
    _Sampler("Euler a", "EulerAncestralDiscreteScheduler", ("euler_ancestral",), stochastic=True),
    _Sampler("Heun", "HeunDiscreteScheduler"),
    _Sampler("DPM2", "KDPM2DiscreteScheduler", ("dpm_2",)),
    _Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", ("dpm_2_ancestral",), stochastic=True),
    _Sampler("DPM-Solver", "DPMSolverMultistepScheduler", ("DPM-Solver++",)),
    _Sampler(
        "DPM++ 2M",
        "DPMSolverMultistepScheduler",
        ("dpmpp_2m",),
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    _Sampler(
        "DPM++ 2M SDE",
        "DPMSolverMultistepScheduler",
        ("dpmpp_2m_sde",),
        {"algorithm_type": _SDE, "solver_order": 2},
        stochastic=True,
    ),
    _Sampler(
        "DPM++ 3M",
        "DPMSolverMultistepScheduler",
        ("dpmpp_3m",),
        {"algorithm_type": "dpmsolver++", "solver_order": 3},
    ),
    _Sampler(
        "DPM++ 3M SDE",
        "DPMSolverMultistepScheduler",
        ("dpmpp_3m_sde",),
        {"algorithm_type": _SDE, "solver_order": 3},
        stochastic=True,
    ),
    _Sampler("DPM-Solver Singlestep", "DPMSolverSinglestepScheduler"),
    _Sampler(
        "DPM++ 2S",
        "DPMSolverSinglestepScheduler",
        ("dpmpp_2s",),
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    _Sampler(
        "DPM++ SDE",
        "DPMSolverSinglestepScheduler",
        ("dpmpp_sde",),
        {"algorithm_type": _SDE, "solver_order": 2},
        stochastic=True,
    ),
    _Sampler("UniPC", "UniPCMultistepScheduler", ("uni_pc",)),
    _Sampler("DEIS", "DEISMultistepScheduler"),
    _Sampler("SA-Solver", "SASolverScheduler", ("sa_solver",), stochastic=True),
    _Sampler("LCM", "LCMScheduler", stochastic=True),
    _Sampler("TCD", "TCDScheduler"),
    _Sampler("EDM Euler", "EDMEulerScheduler"),
    _Sampler("EDM DPM++ 2M", "EDMDPMSolverMultistepScheduler"),
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
    sampler, sigmas = _look_up(name)
    return sampler.name if sigmas is None else f"{sampler.name} {sigmas.capitalize()}"


def list_samplers() -> list[SamplerInfo]:
    """All samplers, without the Karras, Exponential and Beta forms: `sigmas` tells those."""
    return [
        SamplerInfo(
            name=sampler.name,
            aliases=(*sampler.aliases, *_class_names(sampler)),
            scheduler=sampler.scheduler,
            sigmas=tuple(_schedules(sampler.scheduler)),
            stochastic=sampler.stochastic,
        )
        for sampler in _SAMPLERS
    ]


def build_scheduler(spec: SamplerSpec, scheduler_config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler that the table of `spec` stands for, made for a model.

    Raises errors of the `errors` tree for what is refused by name, and whatever the scheduler
    itself raises.
    """
    sampler, sigmas = _look_up(spec.name)
    _check_family(sampler, scheduler_config)
    parameters = _parameters(sampler.scheduler)
    options = {
        **sampler.options,
        **_sigma_options(sampler, sigmas, spec.sigmas),
        **_spacing_options(sampler, spec.timestep_spacing),
    }
    if "clip_sample" in parameters and not _states(scheduler_config, "clip_sample"):
        options["clip_sample"] = False  # some classes clip by default, as suits pixels, not latents
    scheduler = getattr(diffusers, sampler.scheduler).from_config(scheduler_config, **options)
    _refuse_clipping(sampler, {key: scheduler.config[key] for key in parameters})
    return scheduler


def compile_table(
    spec: SamplerSpec,
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    window: Window = WHOLE,
) -> StepTable:
    """The compiled sampler, cached. `scheduler_config` is the model's (`pipe.scheduler.config`).

    Raises UnknownSampler, InvalidParameter naming the field, or UnsupportedSampler where diffusers
    or the table cannot do what is asked. Safe to call from any thread.
    """
    if num_inference_steps < 1:
        raise InvalidParameter(
            f"num_inference_steps must be at least 1, not {num_inference_steps}",
            param="num_inference_steps",
        )
    if not (math.isfinite(spec.eta) and spec.eta >= 0):
        raise InvalidParameter(f"eta must be 0 or more, not {spec.eta}", param="eta")
    spec = replace(spec, name=canonical_name(spec.name))
    config = json.dumps(dict(scheduler_config), sort_keys=True, default=_plain)
    with _compiling:
        return _compile(spec, config, num_inference_steps, window)


# Held while looking in the cache too, so that equal requests at once compile one table, and
# because `_quiet` changes state of the whole process. No other lock is taken inside.
_compiling = threading.Lock()


@lru_cache(maxsize=CACHE_SIZE)
def _compile(spec: SamplerSpec, config: str, num_inference_steps: int, window: Window) -> StepTable:
    try:
        with _quiet():
            scheduler = build_scheduler(spec, json.loads(config))
            scheduler.set_timesteps(num_inference_steps, device="cpu")
            return read_table(scheduler, window, spec.eta)
    except SDBentoError:
        raise
    except Exception as exc:  # whatever a scheduler raises for options it cannot combine
        raise UnsupportedSampler(
            f"{spec.name} with num_inference_steps={num_inference_steps} does not go with this "
            f"model's scheduler configuration{_reason(exc)}",
            param="scheduler",
        ) from exc


@contextmanager
def _quiet() -> Iterator[None]:
    """Schedulers warn of deprecations and changed options; nobody who asks here can act on it."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(exc: Exception) -> str:
    """A scheduler's own words, where it refused on purpose; an IndexError tells nobody much."""
    line = traceback.extract_tb(exc.__traceback__)[-1].line or ""
    if not line.startswith("raise") or not str(exc):
        return ""
    return ": " + re.sub(r"<class '[^']*?(\w+)'>", r"\1", str(exc).splitlines()[0])


def _plain(value: Any) -> Any:
    """An array of betas as JSON; anything else by what it prints as."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _look_up(name: str) -> tuple[_Sampler, str | None]:
    """The sampler of a name, and the sigmas that the name ends in."""
    key = _key(name)
    if key in _BY_KEY:
        return _BY_KEY[key], None
    for sigmas in _NAMED_SIGMAS:
        sampler = _BY_KEY.get(key.removesuffix(sigmas))
        if sampler is not None:
            _check_schedule(sampler, sigmas, UnsupportedSampler, "scheduler")
            return sampler, sigmas
    for refused, reason in _REFUSED.items():
        if key.startswith(_key(refused).removesuffix("scheduler")):
            raise UnsupportedSampler(f"{name} is not offered: {reason}", param="scheduler")
    raise UnknownSampler(f"no sampler is called {name!r}{_nearest(key)}", param="scheduler")


def _key(name: str) -> str:
    """What is left of a name when case, spaces and punctuation do not matter."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def _nearest(key: str) -> str:
    names = {_BY_KEY[near].name: None for near in difflib.get_close_matches(key, _BY_KEY)}
    return f"; the nearest are {', '.join(names)}" if names else "; GET /samplers lists them all"


def _class_names(sampler: _Sampler) -> tuple[str, ...]:
    """The class's name and its short forms; only for the sampler that adds nothing to the class."""
    if sampler.options:
        return ()
    short = sampler.scheduler.removesuffix("Scheduler")
    names = (sampler.scheduler, short, short.removesuffix("Discrete"))
    return tuple(dict.fromkeys(name for name in names if _key(name) != _key(sampler.name)))


_BY_KEY = {
    _key(name): sampler
    for sampler in _SAMPLERS
    for name in (sampler.name, *sampler.aliases, *_class_names(sampler))
}


@lru_cache
def _parameters(scheduler: str) -> frozenset[str]:
    """The options that a scheduler's configuration can have."""
    signature = inspect.signature(getattr(diffusers, scheduler).__init__)
    return frozenset(signature.parameters) - {"self"}


def _schedules(scheduler: str) -> dict[str, dict[str, Any]]:
    """The noise schedules that a scheduler has, with the options that choose each."""
    parameters = _parameters(scheduler)
    if "sigma_schedule" in parameters:  # the EDM classes
        return {name: {"sigma_schedule": name} for name in ("karras", "exponential")}
    flags = {name: f"use_{name}_sigmas" for name in _NAMED_SIGMAS}
    off = {flag: False for flag in (*flags.values(), "use_lu_lambdas") if flag in parameters}
    named = {name: {**off, flag: True} for name, flag in flags.items() if flag in parameters}
    return {"normal": off, **named}


def _sigma_options(sampler: _Sampler, named: str | None, asked: str | None) -> dict[str, Any]:
    if asked is not None:
        _check_schedule(sampler, asked, InvalidParameter, "sigmas")
    if named is not None and asked not in (None, named):
        raise InvalidParameter(
            f"sigmas is {asked!r}, but the scheduler's name asks for {named!r}", param="sigmas"
        )
    chosen = asked or named
    return {} if chosen is None else _schedules(sampler.scheduler)[chosen]


def _check_schedule(
    sampler: _Sampler, sigmas: str, error: type[InvalidParameter], param: str
) -> None:
    allowed = _schedules(sampler.scheduler)
    if sigmas not in allowed:
        raise error(
            f"{sampler.name} has no {sigmas!r} sigmas; it has {', '.join(allowed)}", param=param
        )


def _spacing_options(sampler: _Sampler, spacing: str | None) -> dict[str, Any]:
    if spacing is None:
        return {}
    if "timestep_spacing" not in _parameters(sampler.scheduler):
        raise InvalidParameter(
            f"{sampler.name} has no choice of timestep_spacing", param="timestep_spacing"
        )
    if spacing not in SPACINGS:
        raise InvalidParameter(
            f"timestep_spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}",
            param="timestep_spacing",
        )
    return {"timestep_spacing": spacing}


def _check_family(sampler: _Sampler, scheduler_config: Mapping[str, Any]) -> None:
    """Models trained as in Karras et al. 2022 take EDM samplers, all others take the others."""
    model_is_edm = "sigma_data" in scheduler_config
    if model_is_edm != ("sigma_data" in _parameters(sampler.scheduler)):
        wanted = "EDM" if model_is_edm else "non-EDM"
        raise UnsupportedSampler(
            f"this model needs {wanted} samplers, which {sampler.name} is not", param="scheduler"
        )


def _states(scheduler_config: Mapping[str, Any], option: str) -> bool:
    """Whether the model's configuration gives the option itself, and not its class's default."""
    defaults = scheduler_config.get("_use_default_values", ())
    return option in scheduler_config and option not in defaults


def _refuse_clipping(sampler: _Sampler, config: Mapping[str, Any]) -> None:
    """The options known to make a scheduler other than affine, by name."""
    refused = [option for option in ("thresholding", "clip_sample") if config.get(option)]
    if str(config.get("variance_type")).startswith("learned"):
        refused.append("variance_type")
    if refused:
        raise UnsupportedSampler(
            f"{sampler.name} is not affine with this model's scheduler option "
            f"{refused[0]}={config[refused[0]]!r}",
            param="scheduler",
        )
