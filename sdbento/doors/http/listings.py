"""GET /models and GET /samplers: what requests can name."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from sdbento.doors.http.routing import TheApp, door

if TYPE_CHECKING:
    from sdbento.app import ListedModel

router = door("Models")


class Model(BaseModel):
    """A model that requests can name, with what it decides where a request does not."""

    name: str
    family: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None = Field(description="null: the one that the model was published with")
    memory_gb: float
    inpaints: bool
    refines: bool
    loaded: bool
    attention: str | None = Field(description="What computes its attention; null: not in memory")
    devices: list[int] = Field(description="Numbers of the devices that have it in memory")
    default: bool


class Models(BaseModel):
    models: list[Model]


class Sampler(BaseModel):
    """A sampler, the other names it has, and the noise schedules that `sigmas` may name."""

    name: str
    aliases: list[str]
    scheduler: str = Field(description="The class of diffusers")
    sigmas: list[str]
    stochastic: bool


class Samplers(BaseModel):
    samplers: list[Sampler]


@router.get("/models")
async def list_models(app: TheApp) -> Models:
    """The models that requests can name."""
    models = await run_in_threadpool(app.list_models)
    return Models(models=[_to_model(model) for model in models])


@router.get("/samplers")
async def list_samplers(app: TheApp) -> Samplers:
    """The samplers that requests can name."""
    samplers = [Sampler.model_validate(asdict(sampler)) for sampler in app.list_samplers()]
    return Samplers(samplers=samplers)


def _to_model(model: ListedModel) -> Model:
    spec = model.spec
    return Model(
        name=spec.name,
        family=spec.family,
        width=spec.width,
        height=spec.height,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        scheduler=spec.sampler,
        memory_gb=spec.memory_gb,
        inpaints=spec.inpaints,
        refines=spec.refines,
        loaded=model.attention is not None,
        attention=model.attention,
        devices=list(model.devices),
        default=model.is_default,
    )
