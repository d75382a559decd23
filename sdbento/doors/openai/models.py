"""GET /v1/models, the models of this server, and which of them a client means by a name.

A name without a slash is one of ours or means the default model; the Hub is never asked about
"dall-e-3". A name with a slash is the id of a model on the Hub, or a path, where the settings let
requests name those, and an error if there is no such model.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from sdbento.doors.http.routing import TheApp, door
from sdbento.errors import UnknownModel

if TYPE_CHECKING:
    from sdbento.app import App, ListedModel

OPENAI = "openai/"  # how routers of many providers begin the names of OpenAI's models
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
@router.get("/v1/models/", include_in_schema=False)
async def list_models(app: TheApp) -> Models:
    """The models that requests can name, the default first."""
    return Models(data=[_to_model(model) for model in await listed(app)])


@router.get("/v1/models/{id:path}")
async def retrieve_model(id: str, app: TheApp) -> Model:
    """One of these models. An alias is answered with the model's own name."""
    return _to_model(await find_listed(app, id.rstrip("/")))


@router.options("/v1/models", include_in_schema=False)
@router.options("/v1/models/{id:path}", include_in_schema=False)
async def ping() -> Response:
    """As for the routes that make images."""
    return Response(status_code=204, headers={"Allow": "GET, OPTIONS"})


async def ours(app: App, name: str | None) -> str | None:
    """`name` where it is one of ours, whether the caller may use it or not; None means the default
    model."""
    if name is None or app.catalog.known(name) is not None:
        return name
    if any(name in spec.names for spec in await run_in_threadpool(app.catalog.list)):
        return name
    may_be_unlisted = app.settings.allow_any_model and not name.startswith(OPENAI)
    return name if may_be_unlisted and "/" in name else None


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
