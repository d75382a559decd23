"""The result of a request: its images, how they were made, and the answer that carries them."""

from __future__ import annotations

import hashlib
import time
from base64 import b64encode
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdbento.access.threads import SharedThreads
from sdbento.engine.handle import Handle
from sdbento.engine.trajectory import Stage
from sdbento.images import codec
from sdbento.images.canvas import Overlay
from sdbento.images.metadata import Metadata
from sdbento.metrics.definitions import images_total, queue_seconds
from sdbento.metrics.requests import current_request
from sdbento.outbound.urls import is_url
from sdbento.request.embedded import infotext_of, public
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.schema import GenerateRequest, GenerateResponse, Timings
from sdbento.request.settle import SettledRequest
from sdbento.telemetry import spans
from sdbento.url_redaction import all_without_credentials, redacted_message

NOT_PARAMETERS = {"output_format", "output_compression", "preview_every", "timeout", "num_images"}


@dataclass(frozen=True)
class Result:
    """The images of a request, and how they were made."""

    request: SettledRequest
    sampler: str  # the one that was used, which may be the model's own
    images: list[Image.Image]
    timings: Timings
    warnings: tuple[str, ...]

    @property
    def seeds(self) -> list[int]:
        return [self.request.seed + i for i in range(len(self.images))]

    def parameters(self, image: int = 0) -> dict[str, Any]:
        """The parameters that make image number `image` again; images that were sent along appear
        as digests. URLs that need a token need it again."""
        asked = all_without_credentials(describe(self.request))
        chosen = {name: value for name, value in asked.items() if name not in NOT_PARAMETERS}
        return chosen | {"seed": self.seeds[image]}

    def infotext(self, image: int = 0) -> str:
        """How image number `image` was made, as AUTOMATIC1111's web UI writes it."""
        return infotext_of(self.request, self.sampler, self.seeds[image])

    def encode(self, image: int = 0) -> bytes:
        """Image number `image` as a file, which says how it was made."""
        metadata = Metadata(self.infotext(image), public(self.parameters(image)))
        return codec.encode(
            self.images[image],
            self.request.output_format,
            metadata,
            quality=self.request.output_compression,
        )

    async def encode_all(self, threads: SharedThreads) -> list[bytes]:
        """Every image, as by `encode`, in one of `threads`."""
        with self._encoding():
            return await threads.run(self._encode_all)

    def _encode_all(self) -> list[bytes]:
        """Blocking, for milliseconds an image."""
        return [self.encode(i) for i in range(len(self.images))]

    def _encoding(self) -> AbstractContextManager[None]:
        attributes = {
            "gen_ai.request.choice.count": len(self.images),
            "sdbento.format": self.request.output_format,
        }
        return spans.spanning("encode", attributes)

    async def to_response(self, threads: SharedThreads) -> GenerateResponse:
        """The answer; images are encoded in one of `threads`."""

        def encode_all() -> list[str]:
            return [b64encode(image).decode("ascii") for image in self._encode_all()]

        with self._encoding():
            images = await threads.run(encode_all)
        return GenerateResponse(
            images=images,
            seeds=self.seeds,
            infotexts=[self.infotext(i) for i in range(len(self.images))],
            model=self.request.model,
            parameters=self.parameters(),
            timings=self.timings,
            warnings=[redacted_message(warning) for warning in self.warnings],
        )


@dataclass(frozen=True)
class Begun:
    """What whoever makes the images says of a request when it begins: its handle, its model's own
    sampler, and the warnings that only its models and LoRAs gave rise to."""

    handle: Handle
    own_sampler: str
    warnings: tuple[str, ...] = ()


class RunningRequest:
    """A request in the engine: its handle, and what of it the result still needs.

    The images that came with it are not among that, so that they do not stay in memory.
    """

    def __init__(
        self,
        request: ResolvedRequest,
        begun: Begun,
    ) -> None:
        self.handle = begun.handle
        self._settled = request.settled
        self.sampler = request.settled.scheduler or begun.own_sampler
        self._overlay: Overlay | None = None if request.canvas is None else request.canvas.overlay
        self._warnings = request.warnings + begun.warnings
        self._arrived = request.arrived
        current_request().note_model(request.settled.model)

    async def result(self, threads: SharedThreads) -> Result:
        """Wait until all images are there; raises what went wrong. Cancelling this stops it. What
        is still to be done to them is done in one of `threads`."""
        await self.handle.wait()
        return await threads.run(self._result, time.monotonic())

    def _result(self, now: float) -> Result:
        """Blocking: images may have to be put back into their originals."""
        handle, overlay = self.handle, self._overlay
        started = handle.started or now
        calls = handle.calls.get(Stage.DECODE)
        decoding = 0.0 if calls is None else calls.seconds
        images = handle.images
        queue_seconds.observe(started - self._arrived)
        images_total.add(self._settled.model, _task(self._settled), amount=len(images))
        return Result(
            request=self._settled,
            sampler=self.sampler,
            images=images if overlay is None else [overlay.apply(image) for image in images],
            timings=Timings(
                queued=round(started - self._arrived, 4),
                denoising=round(now - started - decoding, 4),
                decoding=round(decoding, 4),
                total=round(now - self._arrived, 4),
            ),
            warnings=self._warnings,
        )


def _task(request: GenerateRequest) -> str:
    if request.upscale is not None:
        return "upscale"
    if request.mask_image is not None or request.outpaint is not None:
        return "inpaint"
    return "txt2img" if request.image is None else "img2img"


def describe(request: GenerateRequest) -> dict[str, Any]:
    """What was asked for, as JSON, without defaults; images by URL or else by their digest."""
    described = request.model_dump(mode="json", exclude_defaults=True)
    for holder in (described, *described.get("controlnet", ())):
        for field in ("image", "mask_image"):
            if (source := holder.get(field)) is not None:
                holder[field] = _digest(source)
    return described


def _digest(source: str) -> str:
    if is_url(source):
        return source
    return f"sha256:{hashlib.sha256(source.encode()).hexdigest()}"
