"""Which model a client means, whose list of models may be OpenAI's own.

A name without a slash is one of ours or means the default model; the Hub is never asked about
"dall-e-3". A name with a slash is the id of a model on the Hub, or a path, where the settings let
requests name those, and an error if there is no such model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from sdbento.errors import UnknownModel

if TYPE_CHECKING:
    from sdbento.app import App, ListedModel

OPENAI = "openai/"  # how routers of many providers begin the names of OpenAI's models


async def ours(app: App, name: str | None) -> str | None:
    """`name` where it is one of ours; None means the default model."""
    if name is None or app.catalog.known(name) is not None:
        return name
    for model in await listed(app):
        if name in model.spec.names:
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
