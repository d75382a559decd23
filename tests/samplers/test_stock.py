"""What the stock pipelines' constructors change in a scheduler's configuration."""

from __future__ import annotations

import copy
import inspect
import itertools
from functools import cache
from typing import Any

import diffusers
import pytest

from sdbento.errors import UnsupportedSampler
from sdbento.models.pipeline import Pipeline
from sdbento.samplers import stock
from sdbento.samplers.names import list_samplers
from sdbento.samplers.scheduler import SamplerSpec, build_scheduler
from tests.support.oracle import tiny_control, tiny_model
from tests.support.stock import stock_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

SCHEDULERS = sorted({s.scheduler for s in list_samplers() if "EDM" not in s.name})
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE |= {"num_train_timesteps": 100}
# A repository leaves out the options that constructors change, or sets another value.
REPOSITORIES: dict[str, dict[str, Any]] = {
    "silent": {"clip_sample": False},
    "old": {"clip_sample": False, "steps_offset": 0, "skip_prk_steps": False},
    "clipping": {"clip_sample": True},
}
TASKS = list(itertools.product(("sd15", "sdxl"), ("", "image", "mask"), (False, True)))


def read(options: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a loaded scheduler, with the defaults of its class."""
    scheduler = diffusers.PNDMScheduler.from_config({**NOISE, **options})
    return {**scheduler.config, "_class_name": "PNDMScheduler"}


@cache
def model(family: str) -> Pipeline:
    return tiny_model(family)


@cache
def schedulers(repository: str) -> dict[str, Any]:
    config = read(REPOSITORIES[repository])
    return {name: getattr(diffusers, name).from_config(config) for name in SCHEDULERS}


def constructed(family: str, task: str, controlled: bool, scheduler: Any) -> Any:
    networks = [tiny_control(family).module] if controlled else []
    asked = {"image": task == "image", "mask": task == "mask"}
    return stock_pipeline(model(family), networks, scheduler=scheduler, **asked)


def class_of(family: str, task: str, controlled: bool) -> str:
    return stock.pipeline_class(
        is_sdxl=family == "sdxl", image=task != "", inpaint=task == "mask", controlnet=controlled
    )


@pytest.mark.parametrize("repository", REPOSITORIES)
@pytest.mark.parametrize(("family", "task", "controlled"), TASKS)
def test_a_samplers_configuration_is_that_left_by_the_stock_constructor(
    family: str, task: str, controlled: bool, repository: str
) -> None:
    config, name = read(REPOSITORIES[repository]), class_of(family, task, controlled)
    for scheduler in SCHEDULERS:
        made = copy.copy(schedulers(repository)[scheduler])
        options = inspect.signature(type(made).__init__).parameters.keys() - {"self"}
        pipe = constructed(family, task, controlled, made)
        assert type(pipe).__name__ == name
        theirs = {option: pipe.scheduler.config[option] for option in options}
        ours = stock.scheduler_config(name, config)
        if theirs.get("clip_sample"):
            with pytest.raises(UnsupportedSampler, match="clip_sample"):
                build_scheduler(SamplerSpec(scheduler), ours)
        else:
            built = build_scheduler(SamplerSpec(scheduler), ours).config
            assert {option: built[option] for option in options} == theirs, scheduler
