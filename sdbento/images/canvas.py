"""Sent images resized to what the latents need, and results put back into the originals.

Sizes, crops and masks are what diffusers' VaeImageProcessor makes of them, as the stock img2img and
inpainting pipelines call it. Knows nothing of requests, VAEs or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageFilter

from sdbento.catalog.families import VAE_FACTOR
from sdbento.errors import InvalidParameter
from sdbento.images.codec import flatten

ResizeMode = Literal["stretch", "crop", "fit"]
Box = tuple[int, int, int, int]  # left, top, right, bottom

MAX_ENLARGED = 2**25  # pixels of an image that is to be cropped: it is first resized as a whole
_MODES = {"stretch": "default", "crop": "crop", "fit": "fill"}  # in diffusers' words
_images = VaeImageProcessor(vae_scale_factor=VAE_FACTOR)
_masks = VaeImageProcessor(
    vae_scale_factor=VAE_FACTOR,
    do_normalize=False,
    do_binarize=True,
    do_convert_grayscale=True,
)
_controls = VaeImageProcessor(vae_scale_factor=VAE_FACTOR, do_normalize=False, do_convert_rgb=True)
RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True, eq=False)
class Overlay:
    """How a result is put back into the original: it shows where `mask` is white."""

    original: Image.Image
    mask: Image.Image  # "L", of the original's size
    box: Box | None = None  # where in the original the result belongs; None: all of it

    def apply(self, image: Image.Image) -> Image.Image:
        result: Image.Image = _images.apply_overlay(self.mask, self.original, image, self.box)
        return result


@dataclass(frozen=True, eq=False)
class Canvas:
    """What image-to-image and inpainting start from; the same for all images of a request."""

    pixels: torch.Tensor  # [1, 3, H, W] on [-1, 1]
    mask: torch.Tensor | None = None  # [1, 1, H, W], 1: repaint
    overlay: Overlay | None = None
    box: Box | None = None  # what was cut out of image and mask before they were resized


def prepare_canvas(
    image: Image.Image,
    width: int,
    height: int,
    mode: ResizeMode = "stretch",
    *,
    mask: Image.Image | None = None,
    blur: int = 0,
    crop_padding: int | None = None,
) -> Canvas:
    """`image` at width x height, and its `mask`, which is white where it is to be repainted.

    With a `blur` the repainted part fades into the original, which is put back around it. With
    `crop_padding` only the masked region and that many pixels around it are repainted, at the full
    width x height. Raises InvalidParameter for a mask without white, for a side that would vanish,
    and where nearly all would be cropped.
    """
    image = flatten(image)
    if crop_padding is None:
        _check_ratio(image, width, height, mode)
    if mask is None:
        return Canvas(_tensor(_images, image, width, height, _MODES[mode]))
    mask = _same_size(flatten(mask).convert("L"), image)
    soft = mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask
    box, resize = None, _MODES[mode]
    if crop_padding is not None:
        box, resize = _crop_box(soft, width, height, crop_padding), "fill"
    overlay = None
    if box is not None:
        overlay = Overlay(image, soft, box)
    elif blur:
        overlay = Overlay(*(_images.resize(i, height, width, resize) for i in (image, soft)))
    return Canvas(
        pixels=_tensor(_images, image, width, height, resize, box),
        mask=_tensor(_masks, soft, width, height, resize, box),
        overlay=overlay,
        box=box,
    )


def prepare_control(
    image: Image.Image, width: int, height: int, mode: ResizeMode, box: Box | None = None
) -> torch.Tensor:
    """A control image as a ControlNet reads it, [1, 3, H, W] on [0, 1]; `box` is the canvas's."""
    if box is None:
        _check_ratio(image, width, height, mode)
    resize = _MODES[mode] if box is None else "fill"
    return _tensor(_controls, flatten(image), width, height, resize, box)


def inpaint_control(canvas: Canvas) -> torch.Tensor:
    """The control image of inpainting ControlNets: the image, with -1 where it is repainted.

    Raises InvalidParameter where there is no mask.
    """
    if canvas.mask is None:
        raise InvalidParameter(
            "an inpaint ControlNet needs a mask_image, or a control image of its own",
            param="controlnet.image",
        )
    return torch.where(canvas.mask > 0.5, -1.0, canvas.pixels / 2 + 0.5)


def extend(
    image: Image.Image, mask: Image.Image | None, margins: Box, overlap: int
) -> tuple[Image.Image, Image.Image]:
    """The image with `margins` pixels more on the left, top, right and bottom, and a mask of them.

    The margins are filled with the nearest pixels. The new mask includes the given one, and reaches
    `overlap` pixels into the image, so that the seam is repainted too.
    """
    left, top, right, bottom = margins
    pixels = np.asarray(flatten(image))
    extended = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")
    repaint = np.zeros(pixels.shape[:2], np.uint8)
    if mask is not None:
        repaint = np.array(_same_size(flatten(mask).convert("L"), image))
    width, height = image.size
    inner = [overlap if margin else 0 for margin in margins]
    edge = np.ones_like(repaint, dtype=bool)
    edge[inner[1] : height - inner[3], inner[0] : width - inner[2]] = False
    repaint[edge] = 255
    whole = np.pad(repaint, ((top, bottom), (left, right)), constant_values=255)
    return Image.fromarray(extended), Image.fromarray(whole)


def resized(image: Image.Image, width: int, height: int, mode: ResizeMode) -> Image.Image:
    """`image` at width x height, in RGB. Raises InvalidParameter for a side that would vanish, and
    where nearly all would be cropped."""
    _check_ratio(image, width, height, mode)
    result: Image.Image = _controls.resize(flatten(image), height, width, _MODES[mode])
    return result


def enlarge(image: Image.Image, width: int, height: int, upscaler: str) -> torch.Tensor:
    """`image` at a larger size, [1, 3, H, W] on [-1, 1]."""
    larger = flatten(image).resize((width, height), RESAMPLING[upscaler])
    return _tensor(_images, larger, width, height, "default")


def _same_size(mask: Image.Image, image: Image.Image) -> Image.Image:
    if mask.size == image.size:
        return mask
    return mask.resize(image.size, Image.Resampling.LANCZOS)


def _crop_box(mask: Image.Image, width: int, height: int, padding: int) -> Box:
    if mask.getbbox() is None:
        raise InvalidParameter(
            "mask_image has nothing white: padding_mask_crop has no region to repaint",
            param="mask_image",
        )
    box: Box = _masks.get_crop_region(mask, width, height, pad=padding)
    return box


def _check_ratio(image: Image.Image, width: int, height: int, mode: ResizeMode) -> None:
    """That nothing vanishes when `image` is fitted in, and not nearly all when it is cropped."""
    scales = width / image.width, height / image.height
    if mode == "fit" and min(scales) * min(image.size) < 1:
        raise InvalidParameter(
            f"an image of {image.width} x {image.height} cannot be fitted into {width} x "
            f"{height}: its short side would vanish",
            param="resize_mode",
        )
    if mode == "crop" and max(scales) ** 2 * image.width * image.height > MAX_ENLARGED:
        raise InvalidParameter(
            f"an image of {image.width} x {image.height} cannot be cropped to {width} x {height}: "
            "nearly all of it would be cut off",
            param="resize_mode",
        )


def _tensor(
    processor: VaeImageProcessor,
    image: Image.Image,
    width: int,
    height: int,
    resize: str,
    box: Box | None = None,
) -> torch.Tensor:
    pixels: torch.Tensor = processor.preprocess(
        image, height=height, width=width, resize_mode=resize, crops_coords=box
    )
    return pixels.float()
