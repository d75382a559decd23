"""A request with everything decided, before and after its models are in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.images.canvas import Canvas
from sdbento.models.leases import Lease
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.request.loras import ChosenLora
from sdbento.request.schema import floor_side
from sdbento.request.settle import SettledRequest, Size


@dataclass(frozen=True, eq=False)
class ResidentModels:
    """The models of one request, in memory; `controlnets` in the order of the request's."""

    pipeline: Pipeline
    controlnets: tuple[ControlNet, ...] = ()
    refiner: Pipeline | None = None


@dataclass(frozen=True, eq=False)
class ResolvedRequest:
    """A settled request with its names looked up and its images read.

    `controlnets` and `control_images` are in the order of the request's ControlNets.
    """

    settled: SettledRequest
    prompt: str  # this and the next without their LoRA tags
    prompt_2: str | None
    loras: tuple[ChosenLora, ...]
    spec: ModelSpec
    controlnets: tuple[ControlNetSpec, ...]
    refiner: ModelSpec | None
    canvas: Canvas | None  # the image to start from; None: text to image
    control_images: tuple[Image.Image | None, ...]  # None: the canvas with its mask
    warnings: tuple[str, ...]
    arrived: float  # monotonic seconds
    deadline: float

    @property
    def size(self) -> Size:
        """Width and height of the images to come."""
        settled, canvas = self.settled, self.canvas
        if canvas is not None and canvas.overlay is not None and canvas.box is not None:
            return canvas.overlay.original.size
        scale = 1.0 if settled.hires is None else settled.hires.scale
        return floor_side(scale * settled.width), floor_side(scale * settled.height)

    @property
    def specs(self) -> list[ModelSpec | ControlNetSpec]:
        """What must be resident, each once, the model first."""
        wanted: list[ModelSpec | ControlNetSpec] = [self.spec, *self.controlnets]
        if self.refiner is not None:
            wanted.append(self.refiner)
        return list(dict.fromkeys(wanted))

    def without_sources(self) -> ResolvedRequest:
        """All that making its images takes. Without the images as they were sent, and the original
        that results are put back into, which together may be many megabytes."""
        controlnets = self.settled.controlnet and [
            control.model_copy(update={"image": None}) for control in self.settled.controlnet
        ]
        sources = {"image": None, "mask_image": None, "controlnet": controlnets}
        return replace(
            self,
            settled=self.settled.model_copy(update=sources),
            canvas=self.canvas and replace(self.canvas, overlay=None),
        )

    def models(self, lease: Lease) -> ResidentModels:
        """What a lease of `specs` holds."""
        resident = dict(zip(self.specs, lease.resources, strict=True))
        pipelines = {spec: r for spec, r in resident.items() if isinstance(r, Pipeline)}
        networks = {spec: r for spec, r in resident.items() if isinstance(r, ControlNet)}
        return ResidentModels(
            pipeline=pipelines[self.spec],
            controlnets=tuple(networks[spec] for spec in self.controlnets),
            refiner=pipelines[self.refiner] if self.refiner else None,
        )
