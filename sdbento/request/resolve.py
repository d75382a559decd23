"""Resolves a request: decides and checks all that it can before any model is in memory.

    look names up -> check -> choose LoRAs -> read images -> settle -> prepare images

Files, hosts and the Hub may be slow, so whatever asks them runs in threads. Knows nothing of doors
or of the engine.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from sdbento.access.threads import SharedThreads
from sdbento.catalog.lookup import Catalog, Names
from sdbento.catalog.specs import ModelSpec, Spec
from sdbento.errors import DeadlineExceeded, Forbidden, InvalidParameter, reraise
from sdbento.images.canvas import Canvas, enlarge, prepare_canvas
from sdbento.images.memory import PIXEL_BYTES
from sdbento.images.redaction import public_name
from sdbento.prompts.check import check_inversions
from sdbento.prompts.inversions import Inversions
from sdbento.prompts.syntax import extract_loras
from sdbento.request.inputs import ImageReader, InputImages, make_control_images
from sdbento.request.loras import ChosenLora, choose_loras
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import SettledRequest, check_fields, settle
from sdbento.settings import Settings

S = TypeVar("S", bound=Spec)

FILE_LOOKUPS = 4  # names that may be looked up on this machine at once
HUB_LOOKUPS = 4  # names that the Hub may be asked about at once


@dataclass(frozen=True)
class _Prompts:
    """The prompts without their LoRA tags, and the LoRAs that the tags and the request name."""

    prompt: str
    prompt_2: str | None
    loras: tuple[ChosenLora, ...]


class Resolver:
    """Resolves requests, many at a time."""

    def __init__(self, settings: Settings, catalog: Catalog, inversions: Inversions) -> None:
        self._settings = settings
        self._catalog = catalog
        self._inversions = inversions
        self._files = SharedThreads(FILE_LOOKUPS, "sdbento-lookup")
        self._hub = SharedThreads(HUB_LOOKUPS, "sdbento-hub")
        self._images = ImageReader(settings)

    async def resolve(
        self, request: GenerateRequest, arrived: float, seconds: float | None = None
    ) -> ResolvedRequest:
        """Raises errors of the `errors` tree only. `arrived`: monotonic seconds. `seconds`: for
        which it may run; None: for its `timeout`."""
        deadline = arrived + (seconds or self._timeout_of(request))
        spec = await self.find_model(request.model)
        check_fields(request, spec)
        controlnets = [
            await self._find_spec(self._catalog.controlnets(spec), control.type)
            for control in request.controlnet or ()
        ]
        refiner = None
        if request.refiner is not None:
            refiner = await self.find_model(request.refiner.model, "refiner.model")
            _check_refiner(refiner, spec)
        prompts = await asyncio.to_thread(self._read_prompts, request, spec)
        images = await self._read_images(request, deadline)
        settled, warnings = settle(request, spec, images.size, self._settings.max_pixels)
        canvas = None
        if images.image is not None or images.controls:
            images, canvas = await self.image_threads.run(self._prepare, settled, images)
        return ResolvedRequest(
            settled=settled,
            prompt=prompts.prompt,
            prompt_2=prompts.prompt_2,
            loras=prompts.loras,
            spec=spec,
            controlnets=tuple(controlnets),
            refiner=refiner,
            canvas=canvas,
            control_images=images.controls,
            warnings=tuple(warnings),
            arrived=arrived,
            deadline=deadline,
        )

    @property
    def image_threads(self) -> SharedThreads:
        """For whatever is done with the images of requests, before and after they are made."""
        return self._images.threads

    def _prepare(
        self, request: SettledRequest, images: InputImages
    ) -> tuple[InputImages, Canvas | None]:
        """Blocking. Control images are made before the canvas, whose faults are found last."""
        images = make_control_images(request, images)
        canvas = _canvas(request, images)
        if canvas is not None and (overlay := canvas.overlay) is not None:
            num_pixels = math.prod(overlay.original.size)
            # With the mask, and the results that are as large.
            num_bytes = num_pixels * (PIXEL_BYTES * (1 + request.num_images) + 1)
            self._images.memory.count(overlay, num_bytes)
        return images, canvas

    def _timeout_of(self, request: GenerateRequest) -> float:
        default = self._settings.request_timeout
        longest = self._settings.max_timeout or default
        if request.timeout is not None and request.timeout > longest:
            raise InvalidParameter(
                f"timeout must be at most {longest:g} seconds on this server (SDBENTO_MAX_TIMEOUT, "
                f"or else SDBENTO_REQUEST_TIMEOUT); given: {request.timeout:g}",
                param="timeout",
            )
        return request.timeout or min(default, longest)

    async def find_model(self, name: str | None, param: str = "model") -> ModelSpec:
        """The model of that name, None: the default. Raises errors of the `errors` tree only.

        What the caller's key does not allow is Forbidden, before anybody is asked whether there is
        such a model.
        """
        meant = name or self._settings.sd_model
        if not self._catalog.is_allowed(meant):
            model = f"the model {public_name(name)!r}" if name else "this server's default model"
            raise Forbidden(f"this key does not allow {model}", param=param)
        return await self._find_spec(self._catalog, meant)

    async def read_image(self, source: str, param: str) -> Image.Image:
        """As `ImageReader.read`. Raises errors of the `errors` tree only."""
        try:
            return await self._images.read(source, param)
        except Exception as exc:
            reraise(exc)

    def close(self) -> None:
        self._images.close()
        for threads in (self._files, self._hub):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _find_spec(self, names: Names[S], name: str) -> S:
        """What `name` stands for; asks files and the Hub in threads of their own, if it must.

        What is on this machine waits for nobody's calls to the Hub.
        """
        if (known := names.known(name)) is not None:
            return known
        try:
            if (local := await self._files.run(names.find_local, name)) is not None:
                return local
            return await self._hub.run(names.resolve, name)
        except Exception as exc:
            reraise(exc)

    def _read_prompts(self, request: GenerateRequest, spec: ModelSpec) -> _Prompts:
        """Blocking. Raises InvalidParameter and its kin for LoRAs and textual inversions that
        cannot be had, or not for this model."""
        prompt, tags = extract_loras(request.prompt)
        prompt_2 = request.prompt_2
        if prompt_2 is not None:
            prompt_2, more = extract_loras(prompt_2)
            tags = [*tags, *more]
        loras = choose_loras(request.lora or [], tags, spec, self._settings)
        num_steps = request.num_inference_steps or spec.num_inference_steps
        for text in (prompt, prompt_2, request.negative_prompt, request.negative_prompt_2):
            if text is not None:
                check_inversions(text, spec, num_steps, self._inversions)
        return _Prompts(prompt, prompt_2, tuple(loras))

    async def _read_images(self, request: GenerateRequest, deadline: float) -> InputImages:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._images.read_all(request)
        except TimeoutError:
            raise DeadlineExceeded(
                "the images were not fetched within the request's timeout", param="timeout"
            ) from None


def _check_refiner(refiner: ModelSpec, spec: ModelSpec) -> None:
    if refiner.family is not spec.family:
        raise InvalidParameter(
            f"refiner.model must be an SDXL model; {refiner.name} is not one",
            param="refiner.model",
        )


def _canvas(request: SettledRequest, images: InputImages) -> Canvas | None:
    if images.image is None:
        return None
    if request.upscale is not None:
        upscaler = request.upscale.upscaler
        return Canvas(enlarge(images.image, request.width, request.height, upscaler))
    return prepare_canvas(
        images.image,
        request.width,
        request.height,
        request.resize_mode,
        mask=images.mask,
        blur=request.mask_blur or 0,
        crop_padding=request.padding_mask_crop,
    )
