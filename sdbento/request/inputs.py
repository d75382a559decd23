"""The images that a request brings along: fetched, decoded, made into control images.

Knows nothing of doors or of the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from sdbento.access.threads import SharedThreads
from sdbento.errors import InvalidParameter
from sdbento.images import codec
from sdbento.images.canvas import extend, resized
from sdbento.images.preprocessors import preprocess
from sdbento.outbound.http import Outbound
from sdbento.outbound.urls import is_url
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import SettledRequest, Size, mask_blur
from sdbento.settings import Settings

DECODERS = 4  # images that are decoded at once: each may be large


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

    def close(self) -> None:
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def read(self, source: str, param: str) -> Image.Image:
        """The image that the request's field `param` holds: a URL, a data URI or base64.

        Raises what `codec.decode` and `Outbound.fetched` raise.
        """
        settings, run = self._settings, self._decoders.run
        if not is_url(source):
            return await run(codec.read, source, settings, param=param)
        limit = settings.max_image_bytes
        async with self._outbound.fetched(source.strip(), max_bytes=limit, param=param) as data:
            return await run(codec.decode, data, settings, param=param)

    async def read_all(self, request: GenerateRequest) -> InputImages:
        """All images of a request, read at once: it takes as long as the slowest host, not as all
        of them together. Raises as `read`, for one of those that fail."""
        try:
            async with asyncio.TaskGroup() as reading:
                images = {
                    param: reading.create_task(self.read(source, param))
                    for param, source in sources(request).items()
                }
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        if not images:
            return InputImages()
        read = {param: task.result() for param, task in images.items()}
        return await asyncio.to_thread(arrange, request, read)


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
