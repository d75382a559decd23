"""The images that a request brings along: read, decoded, made into control images.

Blocking: hosts may be slow, images large. Knows nothing of doors or of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from sdbento.errors import InvalidParameter
from sdbento.images import codec
from sdbento.images.canvas import extend, resized
from sdbento.images.preprocessors import preprocess
from sdbento.outbound import is_url
from sdbento.request.schema import ControlNetInput, GenerateRequest
from sdbento.request.settle import SettledRequest, Size, mask_blur
from sdbento.settings import Settings


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


def has_images(request: GenerateRequest) -> bool:
    """Whether there is anything to read."""
    return bool(request.image is not None or request.mask_image is not None or request.controlnet)


def has_urls(request: GenerateRequest) -> bool:
    """Whether an image has to be fetched from somewhere."""
    sources = [request.image, request.mask_image, *(c.image for c in request.controlnet or ())]
    return any(source is not None and is_url(source) for source in sources)


def read_images(request: GenerateRequest, settings: Settings) -> InputImages:
    """Fetch and decode. Raises InvalidParameter or TooLarge naming the field."""
    image = mask = None
    if request.image is not None:
        image = codec.read(request.image, settings, param="image")
    if request.mask_image is not None:
        mask = codec.read(request.mask_image, settings, param="mask_image")
    if request.outpaint is not None and image is not None:
        out = request.outpaint
        margins = (out.left, out.top, out.right, out.bottom)
        image, mask = extend(image, mask, margins, overlap=2 * (mask_blur(request) or 0))
    controls = tuple(
        _control_image(control, image, settings, f"controlnet.{i}.image")
        for i, control in enumerate(request.controlnet or ())
    )
    return InputImages(image, mask, controls)


def _control_image(
    control: ControlNetInput, image: Image.Image | None, settings: Settings, param: str
) -> Image.Image | None:
    """None: the image with its mask, which an inpaint ControlNet reads."""
    if control.image is not None:
        return codec.read(control.image, settings, param=param)
    if image is None:
        raise InvalidParameter(f"{param} is required where there is no image", param=param)
    return None if control.type == "inpaint" else image


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
