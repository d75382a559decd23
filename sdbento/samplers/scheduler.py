"""From the sampler that a request asks for to the diffusers scheduler it stands for.

What neither the request nor the sampler's name decides, the model's own scheduler configuration
does. Knows nothing of requests, UNets or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from sdbento.errors import InvalidParameter, UnsupportedSampler
from sdbento.samplers.names import Sampler, check_sigmas, look_up, options_of, sigma_schedules

SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class SamplerSpec:
    """The sampler that a request asks for. None: as the name says, else as the model's scheduler
    configuration says."""

    name: str
    sigmas: str | None = None  # "normal", "karras", "exponential", "beta"
    timestep_spacing: str | None = None  # "leading", "trailing", "linspace"
    eta: float = 0.0  # amount of noise in DDIM and TCD; the others have no such parameter


def build_scheduler(spec: SamplerSpec, scheduler_config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler for `spec`, made for a model with that `scheduler_config`.

    Raises UnknownSampler, UnsupportedSampler or InvalidParameter for what cannot work, and whatever
    the scheduler itself raises.
    """
    sampler, sigmas = look_up(spec.name)
    _check_family(sampler, scheduler_config)
    known = options_of(sampler.scheduler)
    options = {
        **sampler.options,
        **_sigma_options(sampler, sigmas, spec.sigmas),
        **_spacing_options(sampler, spec.timestep_spacing),
    }
    if "clip_sample" in known and not _states(scheduler_config, "clip_sample"):
        options["clip_sample"] = (
            False  # the default of some classes, which is right for pixels, not for latents
        )
    scheduler = getattr(diffusers, sampler.scheduler).from_config(scheduler_config, **options)
    _check_affine(sampler, {key: scheduler.config[key] for key in known})
    return scheduler


def _sigma_options(sampler: Sampler, named: str | None, asked: str | None) -> dict[str, Any]:
    if asked is not None:
        check_sigmas(sampler, asked, InvalidParameter, "sigmas")
    if named is not None and asked not in (None, named):
        raise InvalidParameter(
            f"sigmas is {asked!r}, but the scheduler's name asks for {named!r}", param="sigmas"
        )
    chosen = asked or named
    return {} if chosen is None else sigma_schedules(sampler.scheduler)[chosen]


def _spacing_options(sampler: Sampler, spacing: str | None) -> dict[str, Any]:
    if spacing is None:
        return {}
    if "timestep_spacing" not in options_of(sampler.scheduler):
        raise InvalidParameter(
            f"{sampler.name} has no choice of timestep_spacing", param="timestep_spacing"
        )
    if spacing not in SPACINGS:
        raise InvalidParameter(
            f"timestep_spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}",
            param="timestep_spacing",
        )
    return {"timestep_spacing": spacing}


def _check_family(sampler: Sampler, scheduler_config: Mapping[str, Any]) -> None:
    """Models trained as in Karras et al. 2022 need EDM samplers, and only they can use them."""
    model_is_edm = "sigma_data" in scheduler_config
    if model_is_edm != ("sigma_data" in options_of(sampler.scheduler)):
        wanted = "EDM" if model_is_edm else "non-EDM"
        raise UnsupportedSampler(
            f"this model needs {wanted} samplers, which {sampler.name} is not", param="scheduler"
        )


def _states(scheduler_config: Mapping[str, Any], option: str) -> bool:
    """Whether the model's configuration sets the option; else its value is the class's default."""
    defaults = scheduler_config.get("_use_default_values", ())
    return option in scheduler_config and option not in defaults


def _check_affine(sampler: Sampler, config: Mapping[str, Any]) -> None:
    """Refuse, by name, the options that are known to make a scheduler not affine."""
    refused = [option for option in ("thresholding", "clip_sample") if config.get(option)]
    if str(config.get("variance_type")).startswith("learned"):
        refused.append("variance_type")
    if refused:
        raise UnsupportedSampler(
            f"{sampler.name} is not affine with this model's scheduler option "
            f"{refused[0]}={config[refused[0]]!r}",
            param="scheduler",
        )
