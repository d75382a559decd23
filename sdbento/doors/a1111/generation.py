"""AUTOMATIC1111's API, the part that makes images: txt2img, img2img, progress, interrupt, skip."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from sdbento.access.caller import current_caller
from sdbento.doors.a1111.bodies import Img2Img, Txt2Img
from sdbento.doors.a1111.tools.choices import Choice
from sdbento.doors.a1111.tools.options import TheChoices
from sdbento.doors.a1111.work import Generation, Work
from sdbento.doors.http.routing import TheApp, door, shared
from sdbento.images import codec
from sdbento.metrics.requests import current_request

if TYPE_CHECKING:
    from sdbento.app import App
    from sdbento.catalog.specs import ModelSpec
    from sdbento.doors.a1111.translation import Translated

router = door("AUTOMATIC1111")

LEAST = 0.01  # the progress of a call that has not done a step: 0 means that nothing is under way


async def work_of(request: Request) -> Work:
    return shared(request, Work, Work)


TheWork = Annotated[Work, Depends(work_of)]


class ImagesAnswer(BaseModel):
    """What txt2img and img2img answer."""

    images: list[str] = Field(
        description="Base64 of PNG files, whose infotext says how each was made"
    )
    parameters: dict[str, Any] = Field(description="The body, without its images")
    info: str = Field(description="JSON: seeds, infotexts, and what was done differently")


class State(BaseModel):
    """What the web UI's clients look at; `job_count` is 0 when nothing is under way."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = Field(0, description="Images under way")
    job_timestamp: str = "0"
    job_no: int = Field(0, description="Of these, how many have done all steps")
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    """Of the calls of whoever asks, by key."""

    progress: float = Field(0.0, description="0 when nothing is under way, up to 1")
    eta_relative: float = Field(0.0, description="Seconds that are left")
    state: State = State()
    current_image: str | None = Field(None, description="A preview, as base64 of a PNG file")
    textinfo: str | None = None


@router.post("/sdapi/v1/txt2img", response_model=ImagesAnswer)
async def txt2img(body: Txt2Img, app: TheApp, work: TheWork, choices: TheChoices) -> Response:
    """Draw images from text."""
    return await _generate("txt2img", body, app, work, choices.of(current_caller()))


@router.post("/sdapi/v1/img2img", response_model=ImagesAnswer)
async def img2img(body: Img2Img, app: TheApp, work: TheWork, choices: TheChoices) -> Response:
    """Draw images from an image; with a mask, repaint what is white in it."""
    return await _generate("img2img", body, app, work, choices.of(current_caller()))


@router.get("/sdapi/v1/progress")
async def progress(work: TheWork, skip_current_image: bool = False) -> Progress:
    """How far the caller's calls are; whoever asks for the current image gets previews."""
    running = work.of_caller()
    if not running:
        return Progress()
    oldest = running[0]
    image = None
    if not skip_current_image:
        for generation in running:
            generation.watch()
        if (preview := oldest.preview) is not None:
            image = await asyncio.to_thread(codec.as_base64, preview)
    return Progress(
        progress=max(LEAST, sum(one.progress for one in running) / len(running)),
        eta_relative=max(one.eta for one in running),
        state=State(
            interrupted=any(one.interrupted for one in running),
            job=oldest.job,
            job_count=sum(one.num_images for one in running),
            job_no=sum(one.num_finished for one in running),
            sampling_step=oldest.step,
            sampling_steps=oldest.num_steps,
        ),
        current_image=image,
    )


@router.post("/sdapi/v1/interrupt")
async def interrupt(work: TheWork) -> dict[str, Any]:
    """Stop the caller's calls: each answers at once with the images that are finished."""
    for generation in work.of_caller():
        generation.interrupt()
    return {}


@router.post("/sdapi/v1/skip")
async def skip(work: TheWork) -> dict[str, Any]:
    """As interrupt: most images of a call are made at the same time, so that none is the next."""
    return await interrupt(work)


async def _generate(
    job: str, body: Txt2Img | Img2Img, app: App, work: Work, chosen: Choice
) -> Response:
    """`chosen` holds where `body` does not say."""
    # Imported here: it imports torch, which BentoML's supervisor does not need.
    from sdbento.doors.a1111.answer import to_json

    generation = Generation(app, job, body.batch_size * body.n_iter)
    with work.listing(generation):  # from here on, though models and images may have to come first
        translated, spec = await _prepare(body, app, chosen)
        responses = await generation.run(translated.request)
    if generation.interrupted:
        current_request().cancel("interrupt")
    answer = await asyncio.to_thread(to_json, body, translated, spec, responses)
    return Response(answer, media_type="application/json")


async def _prepare(
    body: Txt2Img | Img2Img, app: App, chosen: Choice
) -> tuple[Translated, ModelSpec]:
    from sdbento.doors.a1111.checkpoints import find_checkpoint  # imports torch, as above
    from sdbento.doors.a1111.translation import translate

    model = await find_checkpoint(app, body.override_settings.sd_model_checkpoint or body.model)
    spec = await app.find_model(model or chosen.checkpoint)
    refiner = await find_checkpoint(app, body.refiner_checkpoint)
    mask = None
    if isinstance(body, Img2Img) and body.mask is not None:
        mask = await app.read_image(body.mask, param="mask")
    run = asyncio.to_thread if mask is None else app.image_threads.run  # it encodes the mask
    translated = await run(translate, body, spec.name, refiner, mask, chosen.clip_stop)
    return translated, spec
