"""GET /v1/models, the models of this server, and which of them a client means by a name.

A name that is not ours means the default model. The Hub is never asked about "dall-e-3": only a
name with a slash can be the id of a model there, where the settings let requests name those.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from sdbento.doors.http.routing import TheApp, door
from sdbento.errors import ModelLoadFailed, UnknownModel

if TYPE_CHECKING:
    from sdbento.app import App, ListedModel
    from sdbento.catalog.specs import ModelSpec

OPENAI = "openai/"  # how routers of many providers begin the names of models with OpenAI's API
STARTED = int(time.time())  # models have no date; clients want one

router = door("OpenAI models")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sdbento"] = "sdbento"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models")
async def list_models(app: TheApp) -> Models:
    """The models that requests can name, the default first."""
    return Models(data=[_to_model(model) for model in await listed(app)])


@router.get("/v1/models/{id:path}")
async def retrieve_model(id: str, app: TheApp) -> Model:
    """One of these models. An alias is answered with the model's own name."""
    return _to_model(await find_listed(app, id.removeprefix(OPENAI)))


async def meant(app: App, name: str | None) -> tuple[str | None, ModelSpec]:
    """The model that `name` means, with the name that it has in requests; None: the default.

    Raises Forbidden, and the error if the Hub cannot be reached.
    """
    name = name and name.removeprefix(OPENAI)
    if name and (await _is_listed(app, name) or app.catalog.may_be_on_hub(name)):
        try:
            return name, await app.find_model(name)
        except UnknownModel:
            pass
        except ModelLoadFailed:
            if not app.settings.offline:  # else it is not on this machine, and will not be
                raise
    return None, await app.find_model()


async def _is_listed(app: App, name: str) -> bool:
    """Whether this server has a model of that name, even one that the caller may not use."""
    if app.catalog.known(name) is not None:
        return True
    return any(name in spec.names for spec in await run_in_threadpool(app.catalog.list))


async def listed(app: App) -> list[ListedModel]:
    """All models that this server knows without asking the Hub, the default first."""
    models = await run_in_threadpool(app.list_models)
    return sorted(models, key=lambda model: not model.is_default)


async def find_listed(app: App, name: str) -> ListedModel:
    """Raises UnknownModel."""
    for model in await listed(app):
        if name.casefold() in {known.casefold() for known in model.spec.names}:
            return model
    raise UnknownModel(f"there is no model {name[:80]!r}; GET /v1/models lists them", param="model")


def _to_model(model: ListedModel) -> Model:
    return Model(id=model.spec.name, created=STARTED)
