"""GET and POST options: which model AUTOMATIC1111's clients use, each caller its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from sdbento.access.caller import current_caller
from sdbento.doors.a1111.bodies import Lenient, Name
from sdbento.doors.a1111.checkpoints import find_checkpoint
from sdbento.doors.a1111.tools.choices import Choices, ClipStop
from sdbento.doors.a1111.tools.preloads import Preloads
from sdbento.doors.http.routing import TheApp, app_of, door, shared
from sdbento.images.redaction import public_name

if TYPE_CHECKING:
    from sdbento.app import App

router = door("AUTOMATIC1111")

FILE = "a1111.json"  # in SDBENTO_STATE_DIR


async def choices_of(request: Request) -> Choices:
    folder = app_of(request).settings.state_dir
    return shared(request, Choices, lambda: Choices(folder / FILE))


async def preloads_of(request: Request) -> Preloads:
    return shared(request, Preloads, Preloads)


TheChoices = Annotated[Choices, Depends(choices_of)]
ThePreloads = Annotated[Preloads, Depends(preloads_of)]


class Options(BaseModel):
    """The web UI's settings that mean something here. Two of them can be set: the model and
    `CLIP_stop_at_last_layers`; what the others say is how it is."""

    model_config = ConfigDict(protected_namespaces=())

    sd_model_checkpoint: str | None = Field(
        description="The model's title, as sd-models has it; null where the key must choose one"
    )
    sd_checkpoint_hash: str | None = None
    CLIP_stop_at_last_layers: int = 1
    sd_vae: str = Field("Automatic", description="The model's own")
    samples_format: str = "png"
    enable_pnginfo: bool = Field(True, description="Images say how they were made")
    outdir_samples: str = Field("", description="No image is kept here")


class Changes(Lenient):
    """Settings to change. Those that are not named here are accepted, and change nothing."""

    sd_model_checkpoint: Name | None = Field(
        None, description="A title of sd-models, or a model's name"
    )
    CLIP_stop_at_last_layers: ClipStop | None = Field(
        None, description="The layer of the text encoder to stop at, counted from the last"
    )


@router.get("/sdapi/v1/options")
async def get_options(app: TheApp, choices: TheChoices) -> Options:
    """The settings of whoever asks."""
    chosen = choices.of(current_caller())
    return Options(
        sd_model_checkpoint=title_of(app, chosen.checkpoint),
        CLIP_stop_at_last_layers=chosen.clip_stop,
    )


@router.post("/sdapi/v1/options")
async def set_options(
    app: TheApp, choices: TheChoices, preloads: ThePreloads, changes: Changes
) -> None:
    """Choose another model for all later requests of the same client, also after a restart.

    A client is whoever has the same key or, without keys, the same address. The model is loaded in
    the background. Settings that are not in the body's schema change nothing.
    """
    caller = current_caller()
    title, changed = changes.sd_model_checkpoint, dict[str, Any]()
    if title is not None and title != title_of(app, choices.of(caller).checkpoint):
        name = await find_checkpoint(app, title)
        spec = await app.find_model(name or title)
        changed["checkpoint"] = spec.name
        preloads.begin(caller, spec, app.backend)
    if changes.CLIP_stop_at_last_layers is not None:
        changed["clip_stop"] = changes.CLIP_stop_at_last_layers
    await asyncio.to_thread(choices.change, caller, changed)


@router.post("/sdapi/v1/reload-checkpoint")
async def reload_checkpoint(
    app: TheApp, choices: TheChoices, preloads: ThePreloads
) -> dict[str, str]:
    """Load the chosen model in the background, if it is not in memory."""
    spec = await app.find_model(choices.of(current_caller()).checkpoint)
    preloads.begin(current_caller(), spec, app.backend)
    return {}


@router.post("/sdapi/v1/unload-checkpoint")
async def unload_checkpoint() -> dict[str, str]:
    """Unload nothing, and say so.

    Others may be using the model, and a model leaves memory by itself when another needs the room.
    """
    return {"detail": "nothing was unloaded: models leave memory when others need the room"}


def title_of(app: App, checkpoint: str | None) -> str | None:
    """What a model is called here: its name, without folders. None: the server's default.

    None where the caller's key does not allow it.
    """
    name = checkpoint or app.settings.sd_model
    if not app.catalog.is_allowed(name):
        return None
    spec = app.catalog.known(name)
    return public_name(name if spec is None else spec.name)
