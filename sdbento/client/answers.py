"""What the server answers, as objects: images and how they were made, models, samplers, jobs."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from sdbento.request.schema import GenerateResponse, Timings

SUFFIXES = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",)}
UNFINISHED = ("IN_QUEUE", "IN_PROGRESS")


@dataclass(frozen=True)
class GeneratedImage:
    """One image: `data` is its file, in which `infotext` and all parameters are embedded."""

    data: bytes = field(repr=False)
    seed: int
    infotext: str

    def to_pil(self) -> Image.Image:
        """The pixels. PIL keeps nothing of what is embedded: `save` writes a file that does."""
        image = Image.open(BytesIO(self.data))
        image.load()
        return image

    def save(self, path: str | Path) -> Path:
        """Write the file as the server made it. Returns its path, with a suffix if it had none.

        Raises ValueError for the suffix of another format: `output_format` decides the format.
        """
        path = Path(path)
        with Image.open(BytesIO(self.data)) as image:
            suffixes = SUFFIXES[str(image.format)]
        if not path.suffix:
            path = path.with_suffix(suffixes[0])
        if path.suffix.lower() not in suffixes:
            raise ValueError(
                f"{path} must end in {' or '.join(suffixes)}; "
                "ask for another format by output_format"
            )
        path.write_bytes(self.data)
        return path


@dataclass(frozen=True)
class Generation:
    """The images of one request and everything needed to make them again.

    parameters: all of them as they were used, the model's own included. timings: in seconds.
    warnings: what was done otherwise than asked for.
    """

    images: list[GeneratedImage]
    model: str
    parameters: dict[str, Any]
    timings: Timings
    warnings: list[str]

    @property
    def image(self) -> GeneratedImage:
        """The first image."""
        return self.images[0]

    @property
    def seeds(self) -> list[int]:
        return [image.seed for image in self.images]

    @property
    def infotexts(self) -> list[str]:
        return [image.infotext for image in self.images]

    def save(self, path: str | Path) -> list[Path]:
        """Write all images, several of them as name-1, name-2, ...; see GeneratedImage.save."""
        path = Path(path)
        if len(self.images) == 1:
            return [self.image.save(path)]
        return [
            image.save(path.with_stem(f"{path.stem}-{i}")) for i, image in enumerate(self.images, 1)
        ]


class _Answer(BaseModel):
    """Fields that a newer server has beside these are ignored."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Model(_Answer):
    """A model that requests can name, with what it decides where a request does not.

    scheduler None: the one that the model was published with. attention None: not in memory.
    devices: the numbers of those that have it in memory.
    """

    name: str
    family: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None
    memory_gb: float
    inpaints: bool
    refines: bool
    loaded: bool
    attention: str | None
    devices: list[int] = []
    default: bool


class Models(_Answer):
    models: list[Model]


class Sampler(_Answer):
    """A sampler, the other names it has, and the noise schedules that `sigmas` may name.

    scheduler: its class in diffusers.
    """

    name: str
    aliases: list[str]
    scheduler: str
    sigmas: list[str]
    stochastic: bool


class Samplers(_Answer):
    samplers: list[Sampler]


class Job(_Answer):
    """A job of /run: IN_QUEUE, IN_PROGRESS, COMPLETED, FAILED, CANCELLED or TIMED_OUT.

    `delay` and `execution`: ms in the queue and at work. `error`: one line. `output`: JSON, in the
    form that the job's input asked for.
    """

    id: str
    status: str
    delay: int | None = Field(None, alias="delayTime")
    execution: int | None = Field(None, alias="executionTime")
    output: Any = Field(None, repr=False)
    error: str | None = None

    @property
    def unfinished(self) -> bool:
        return self.status in UNFINISHED

    @property
    def urls(self) -> list[str]:
        """Where its images are, as far as they were uploaded to a bucket."""
        images = self.output.get("images") if isinstance(self.output, dict) else self.output
        if not isinstance(images, list):
            return []
        return [image for image in images if str(image).startswith(("https://", "http://"))]


def to_generation(answer: Any, files: Mapping[str, bytes] = MappingProxyType({})) -> Generation:
    """The answer of /generate, an object of JSON. Raises ValueError for any other.

    files: by their URLs, where the images were uploaded to a bucket.
    """
    response = GenerateResponse.model_validate(answer)
    data = [files.get(image) or b64decode(image, validate=True) for image in response.images]
    each = zip(data, response.seeds, response.infotexts, strict=True)
    return Generation(
        images=[GeneratedImage(*one) for one in each],
        model=response.model,
        parameters=response.parameters,
        timings=response.timings,
        warnings=response.warnings,
    )
