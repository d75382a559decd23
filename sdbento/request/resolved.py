"""A request on its way to the engine: what is known of it before its models are resident."""

from __future__ import annotations

from dataclasses import dataclass

from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.models.leases import Lease
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.request.passes import Resources
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import Pictures


@dataclass(frozen=True, eq=False)
class Order:
    """`settled` is the request with everything decided; `controlnets` are in its order."""

    settled: GenerateRequest
    spec: ModelSpec
    controlnets: list[ControlNetSpec]
    refiner: ModelSpec | None
    pictures: Pictures
    warnings: list[str]
    deadline: float

    @property
    def specs(self) -> list[ModelSpec | ControlNetSpec]:
        """What must be resident, each once, the model first."""
        wanted: list[ModelSpec | ControlNetSpec] = [self.spec, *self.controlnets]
        if self.refiner is not None:
            wanted.append(self.refiner)
        return list(dict.fromkeys(wanted))

    def resources(self, lease: Lease) -> Resources:
        resident = dict(zip(self.specs, lease.resources, strict=True))
        pipelines = {spec: r for spec, r in resident.items() if isinstance(r, Pipeline)}
        networks = {spec: r for spec, r in resident.items() if isinstance(r, ControlNet)}
        return Resources(
            pipeline=pipelines[self.spec],
            controlnets=tuple(networks[spec] for spec in self.controlnets),
            refiner=pipelines[self.refiner] if self.refiner else None,
        )
