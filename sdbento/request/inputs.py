"""The images that a request brings along: fetched, decoded, made into control images.

Knows nothing of doors or of the engine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from sdbento.access.threads import SharedThreads
from sdbento.errors import InvalidParameter, TooLarge
from sdbento.images import codec
from sdbento.images.canvas import extend, resized
from sdbento.images.memory import PIXEL_BYTES, ImageMemory
from sdbento.images.preprocessors import preprocess
from sdbento.outbound.http import Outbound
from sdbento.outbound.urls import is_url
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import SettledRequest, Size, mask_blur
from sdbento.settings import Settings

DECODERS = 4  # images that are decoded at once: each may be large
IMAGE_THREADS = 4  # requests whose images are prepared, put back or encoded at once


@dataclass(frozen=True, eq=False)
class InputImages:
    """What a request brings along, decoded. `controls` are in the order of its ControlNets."""

    image: Image.Image | None = None
    mask: Image.Image | None = None
    controls: tuple[Image.Image | None, ...] = ()

    @property
    def size(self) -> Size | None:
        """Of the image, else of the first control image; None without any."""
        images = [self.image, *self.controls]
        return next((image.size for image in images if image is not None), None)


class ImageReader:
    """Fetches and decodes images of requests, many at a time: slow hosts hold up only those who
    name them, and large images only those who send many."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._outbound = Outbound(settings)
        self._decoders = SharedThreads(DECODERS, "sdbento-decoder")
        self.threads = SharedThreads(IMAGE_THREADS, "sdbento-images")
        self.memory = ImageMemory(settings)

    def close(self) -> None:
        for threads in (self._decoders, self.threads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def read(self, source: str, param: str) -> Image.Image:
        """The image that the request's field `param` holds: a URL, a data URI or base64.

        Raises what `ImageMemory.decode` and `Outbound.fetched` raise.
        """
        settings, run = self._settings, self._decoders.run
        if not is_url(source):
            return await run(self._read_encoded, source, param)
        limit = settings.max_image_bytes
        async with self._outbound.fetched(source.strip(), max_bytes=limit, param=param) as data:
            return await run(self.memory.decode, data, param)

    def _read_encoded(self, source: str, param: str) -> Image.Image:
        data = codec.read_encoded(source.strip(), self._settings, param=param)
        return self.memory.decode(data, param)

    async def read_all(self, request: GenerateRequest) -> InputImages:
        """All images of a request, read at once: it takes as long as the slowest host, not as all
        of them together. Raises as `read`, for one of those that fail."""
        images: dict[str, asyncio.Task[Image.Image]] = {}
        try:
            async with asyncio.TaskGroup() as reading:
                for param, source in sources(request).items():
                    images[param] = reading.create_task(self.read(source, param))
        except BaseExceptionGroup as group:
            images.clear()  # they would be in a cycle with the error, and stay in memory
            raise group.exceptions[0] from None
        if not images:
            return InputImages()
        read = {param: task.result() for param, task in images.items()}
        return await self.threads.run(self._arrange, request, read)

    def _arrange(self, request: GenerateRequest, read: Mapping[str, Image.Image]) -> InputImages:
        _check_extended(request, read.get("image"), codec.PIXELS_FACTOR * self._settings.max_pixels)
        images = arrange(request, read)
        if request.outpaint is not None and images.image is not None:
            self.memory.count(images.image, PIXEL_BYTES * math.prod(images.image.size))
        return images


def sources(request: GenerateRequest) -> dict[str, str]:
    """Where the images are that a request brings along, by field.

    Raises InvalidParameter for a ControlNet that is left without an image.
    """
    given = {"image": request.image, "mask_image": request.mask_image}
    for i, control in enumerate(request.controlnet or ()):
        given[param := f"controlnet.{i}.image"] = control.image
        if control.image is None and request.image is None:
            raise InvalidParameter(f"{param} is required where there is no image", param=param)
    return {param: source for param, source in given.items() if source is not None}


def _check_extended(request: GenerateRequest, image: Image.Image | None, limit: int) -> None:
    if (out := request.outpaint) is None or image is None:
        return
    width, height = out.left + image.width + out.right, out.top + image.height + out.bottom
    if width * height > limit:
        raise TooLarge(
            f"outpaint would make the image {width} × {height} pixels large; the limit is {limit} "
            f"pixels, {codec.PIXELS_FACTOR} × SDBENTO_MAX_PIXELS",
            param="outpaint",
        )


def arrange(request: GenerateRequest, read: Mapping[str, Image.Image]) -> InputImages:
    """What a request brings along, once all of its `sources` are read. Blocking."""
    image, mask = read.get("image"), read.get("mask_image")
    if request.outpaint is not None and image is not None:
        out = request.outpaint
        margins = (out.left, out.top, out.right, out.bottom)
        image, mask = extend(image, mask, margins, overlap=2 * (mask_blur(request) or 0))
    controls = []
    for i, control in enumerate(request.controlnet or ()):
        # An inpaint ControlNet reads the image with its mask.
        default = None if control.type == "inpaint" else image
        controls.append(read.get(f"controlnet.{i}.image", default))
    return InputImages(image, mask, tuple(controls))


def make_control_images(request: SettledRequest, images: InputImages) -> InputImages:
    """The images with control images in place of those that are to be preprocessed.

    At the size of the image to come: the edges of a large photo would vanish when it is reduced.
    Raises InvalidParameter where a preprocessor is not installed.
    """
    controls = list(images.controls)
    for i, control in enumerate(request.controlnet or ()):
        source = controls[i]
        if control.preprocess and source is not None:
            if request.padding_mask_crop is None:
                source = resized(source, request.width, request.height, request.resize_mode)
            controls[i] = preprocess(control.type, source)
    return replace(images, controls=tuple(controls))
