"""GET /v1/models: the models of this server, as OpenAI lists its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel
from starlette.responses import Response

from sdbento.doors.http.routing import TheApp, door
from sdbento.doors.openai import model_names

if TYPE_CHECKING:
    from sdbento.app import ListedModel

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
    return Models(data=[_to_model(model) for model in await model_names.listed(app)])


@router.get("/v1/models/{id:path}")
async def retrieve_model(id: str, app: TheApp) -> Model:
    """One of these models. An alias is answered with the model's own name."""
    return _to_model(await model_names.find_listed(app, id.rstrip("/")))


@router.options("/v1/models", include_in_schema=False)
@router.options("/v1/models/{id:path}", include_in_schema=False)
async def ping() -> Response:
    """As for the routes that make images."""
    return Response(status_code=204, headers={"Allow": "GET, OPTIONS"})


def _to_model(model: ListedModel) -> Model:
    return Model(id=model.spec.name, created=STARTED)
