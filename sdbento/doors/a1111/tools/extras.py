"""POST extra-single-image and extra-batch-images: enlarge images by a filter, without a model.

Source: scripts/postprocessing_upscale.py and modules/postprocessing.py of the web UI.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image
from pydantic import BaseModel, Field
from starlette.responses import Response

from sdbento.doors.a1111.bodies import CUT, Lenient, Name, Share
from sdbento.doors.a1111.tools.encoded import EncodedImage, answer, threads, work_on_image
from sdbento.doors.http.routing import TheApp, door
from sdbento.errors import InvalidParameter, TooLarge
from sdbento.images import codec
from sdbento.images.metadata import Metadata, read_metadata
from sdbento.settings import Settings

if TYPE_CHECKING:
    from sdbento.app import App

router = door("AUTOMATIC1111")

NONE = "None"
FILTERS = {
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
    "Bicubic": Image.Resampling.BICUBIC,
}
MAX_SIDE = 65_535
RESTORERS = {"gfpgan_visibility": "GFPGAN", "codeformer_visibility": "CodeFormer"}

Side = Annotated[int, Field(ge=1, le=MAX_SIDE), CUT]


class Extras(Lenient):
    """How to enlarge."""

    resize_mode: Annotated[int, Field(ge=0, le=1), CUT] = Field(
        0, description="0: by a factor; 1: to a size"
    )
    upscaling_resize: Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)] = Field(
        2.0, description="The factor"
    )
    upscaling_resize_w: Side = 512
    upscaling_resize_h: Side = 512
    upscaling_crop: bool = Field(True, description="Crop what is over, if it is to a size")
    upscaler_1: Name = Field(NONE, description="One of upscalers; None: no change")
    upscaler_2: Name = NONE
    extras_upscaler_2_visibility: Share = Field(0.0, description="How much of it is blended in")
    gfpgan_visibility: Share = 0.0
    codeformer_visibility: Share = 0.0


class SingleImage(Extras):
    """The body of extra-single-image."""

    image: EncodedImage


class ImageFile(Lenient):
    data: EncodedImage


class ImageBatch(Extras):
    """The body of extra-batch-images."""

    files: list[ImageFile] = Field(min_length=1, alias="imageList")


class EnlargedImage(BaseModel):
    image: str = Field(description="Base64 of a PNG file")
    html_info: str = Field(description="What was done, and what was not")


class EnlargedImages(BaseModel):
    images: list[str] = Field(description="Base64 of PNG files")
    html_info: str = Field(description="What was done to the last one, and what was not")


@dataclass(frozen=True)
class _Enlarged:
    file: str  # base64
    num_pixels: int
    info: str


@router.post("/sdapi/v1/extra-single-image", response_model=EnlargedImage)
async def extra_single_image(app: TheApp, body: SingleImage) -> Response:
    """Enlarge an image with a filter. Faces are not restored, which `html_info` says if asked."""
    [enlarged] = await _enlarge_all(app, body, {"image": body.image})
    return await answer({"image": enlarged.file, "html_info": enlarged.info})


@router.post("/sdapi/v1/extra-batch-images", response_model=EnlargedImages)
async def extra_batch_images(app: TheApp, body: ImageBatch) -> Response:
    """Enlarge several images, all in the same way."""
    sources = {f"imageList.{i}.data": file.data for i, file in enumerate(body.files)}
    enlarged = await _enlarge_all(app, body, sources)
    files = [one.file for one in enlarged]
    return await answer({"images": files, "html_info": enlarged[-1].info})


async def _enlarge_all(app: App, body: Extras, sources: dict[str, str]) -> list[_Enlarged]:
    """One after the other. All together have at most as many pixels as one image may that is sent.

    Raises InvalidParameter and TooLarge.
    """
    _check_names(body)
    room = codec.PIXELS_FACTOR * app.settings.max_pixels
    enlarged: list[_Enlarged] = []
    for param, source in sources.items():
        one = await work_on_image(app, threads, _enlarge, body, source, param, room, app.settings)
        room -= one.num_pixels
        enlarged.append(one)
    return enlarged


def _check_names(body: Extras) -> None:
    for field in ("upscaler_1", "upscaler_2"):
        name = getattr(body, field)
        if name not in (NONE, *FILTERS):
            raise InvalidParameter(
                f"there is no upscaler {name!r}; there are: {NONE}, {', '.join(FILTERS)}",
                param=field,
            )


def _enlarge(body: Extras, source: str, param: str, room: int, settings: Settings) -> _Enlarged:
    """Blocking. The result says how the image was made, if the image did."""
    data = codec.read_encoded(source, settings, param=param)
    image = codec.decode(data, settings, param=param)
    width, height = _size(body, image)
    if width * height > room:
        raise TooLarge(
            f"{param} would become {width} × {height} pixels large; {room} pixels are left of the "
            f"{codec.PIXELS_FACTOR} × SDBENTO_MAX_PIXELS that one answer may have",
            param=param,
        )
    steps: dict[str, Any] = {}
    if body.upscaler_1 != NONE:
        image = _filtered(body, image, (width, height))
        steps = _steps(body, image)
    try:
        metadata = read_metadata(data)
    except InvalidParameter:  # a format without any
        metadata = Metadata()
    return _Enlarged(codec.as_base64(image, metadata), width * height, _html(body, steps))


def _size(body: Extras, image: Image.Image) -> tuple[int, int]:
    """Width and height before anything is cropped."""
    if body.upscaler_1 == NONE:
        return image.size
    by = body.upscaling_resize
    if body.resize_mode == 1:
        by = max(body.upscaling_resize_w / image.width, body.upscaling_resize_h / image.height)
    return max(1, round(by * image.width)), max(1, round(by * image.height))


def _filtered(body: Extras, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    enlarged = image.resize(size, FILTERS[body.upscaler_1])
    if body.upscaler_2 != NONE and body.extras_upscaler_2_visibility > 0:
        other = image.resize(size, FILTERS[body.upscaler_2])
        enlarged = Image.blend(enlarged, other, body.extras_upscaler_2_visibility)
    if body.resize_mode == 0 or not body.upscaling_crop:
        return enlarged
    width, height = body.upscaling_resize_w, body.upscaling_resize_h
    left, top = enlarged.width // 2 - width // 2, enlarged.height // 2 - height // 2
    return enlarged.crop((left, top, left + width, top + height))


def _steps(body: Extras, image: Image.Image) -> dict[str, Any]:
    """What was done, as the web UI calls it."""
    steps: dict[str, Any] = {}
    if body.resize_mode == 0:
        steps["Postprocess upscale by"] = f"{body.upscaling_resize:g}"
    else:
        to = f"{body.upscaling_resize_w}x{body.upscaling_resize_h}"
        steps["Postprocess upscale to"] = to
        if body.upscaling_crop:
            steps["Postprocess crop to"] = f"{image.width}x{image.height}"
    steps["Postprocess upscaler"] = body.upscaler_1
    if body.upscaler_2 != NONE and body.extras_upscaler_2_visibility > 0:
        steps["Postprocess upscaler 2"] = body.upscaler_2
    return steps


def _html(body: Extras, steps: dict[str, Any]) -> str:
    lines = [", ".join(f"{name}: {value}" for name, value in steps.items())]
    missing = [name for field, name in RESTORERS.items() if getattr(body, field) > 0]
    if missing:
        lines.append(f"Not applied: {', '.join(missing)}")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)
