"""POST png-info: what an image file says of how it was made. POST interrogate says that it cannot.

Source: `read_info_from_image` and `parse_generation_parameters` of the web UI.
"""

from __future__ import annotations

import json
import re

from pydantic import BaseModel, Field

from sdbento.doors.a1111.bodies import Lenient
from sdbento.doors.a1111.tools.encoded import EncodedImage, threads, work_on_image
from sdbento.doors.http.routing import TheApp, door
from sdbento.errors import NotOffered
from sdbento.images import codec, infotext
from sdbento.images.metadata import PARAMETERS, read_metadata
from sdbento.settings import Settings

router = door("AUTOMATIC1111")

_SIZE = re.compile(r"(\d+)x(\d+)")


class File(Lenient):
    image: EncodedImage


class PngInfo(BaseModel):
    info: str = Field(description='The infotext; "" where there is none')
    items: dict[str, str] = Field(description="Our own parameters, as JSON, where there are any")
    parameters: dict[str, str] = Field(description="What the infotext says, by its names for it")


@router.post("/sdapi/v1/png-info")
async def png_info(app: TheApp, body: File) -> PngInfo:
    """What a PNG, JPEG or WebP file says of how it was made."""
    return await work_on_image(app, threads, _read, body.image, app.settings)


@router.post("/sdapi/v1/interrogate", status_code=501, response_description="It is not offered")
async def interrogate() -> None:
    """Say that describing an image is not offered."""
    raise NotOffered("describing an image is not offered: this server has no model for it")


def _read(image: str, settings: Settings) -> PngInfo:
    metadata = read_metadata(codec.read_encoded(image, settings, param="image"))
    items = {}
    if metadata.parameters is not None:
        items[PARAMETERS] = json.dumps(metadata.parameters)
    text = metadata.infotext or ""
    return PngInfo(info=text, items=items, parameters=_parameters(text))


def _parameters(text: str) -> dict[str, str]:
    """As the web UI parses it: both prompts are always there, and a size is two numbers."""
    parameters = {"Prompt": "", "Negative prompt": ""}
    for name, value in infotext.read(text).items():
        if (size := _SIZE.fullmatch(value)) is None:
            parameters[name] = value
        else:
            parameters |= {f"{name}-1": size[1], f"{name}-2": size[2]}
    return parameters
