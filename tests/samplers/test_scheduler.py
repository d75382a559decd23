"""How a sampler's name changes a scheduler's configuration."""

from __future__ import annotations

from sdbento.samplers.scheduler import SamplerSpec, build_scheduler
from tests.support.schedulers import config_of


def test_a_sampler_name_overrides_the_models_configuration() -> None:
    config = config_of("DPM++ 2M", algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    named = build_scheduler(SamplerSpec("DPM++ 2M"), config).config
    assert (named["algorithm_type"], named["use_karras_sigmas"]) == ("dpmsolver++", True)
    by_class = build_scheduler(SamplerSpec("DPMSolverMultistepScheduler"), config).config
    assert by_class["algorithm_type"] == "sde-dpmsolver++"
    plain = build_scheduler(SamplerSpec("DPM++ 2M", sigmas="normal"), config).config
    assert plain["use_karras_sigmas"] is False
    beta = build_scheduler(SamplerSpec("DPM++ 2M Beta"), config).config
    assert (beta["use_beta_sigmas"], beta["use_karras_sigmas"]) == (True, False)
