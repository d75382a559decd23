"""Builds the trajectories of a resolved request, once its models are in memory.

Blocking: samplers are compiled, LoRAs read. Knows nothing of doors or of the engine's loop.
"""

from __future__ import annotations

from sdbento.access.caller import current_caller
from sdbento.engine.trajectory import Trajectory
from sdbento.errors import InvalidParameter
from sdbento.lora.cache import AdapterCache
from sdbento.lora.hooks import WeightedAdapter
from sdbento.lora.lookup import HubFile
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.inversions import Inversions
from sdbento.request.passes import PassBuilder
from sdbento.request.resolved import ResidentModels, ResolvedRequest
from sdbento.settings import Settings


class TrajectoryBuilder:
    """Keeps the LoRAs that requests use. Thread-safe."""

    def __init__(self, settings: Settings, inversions: Inversions) -> None:
        self._adapters = AdapterCache(settings)
        self._inversions = inversions

    def build(
        self, request: ResolvedRequest, models: ResidentModels
    ) -> tuple[list[Trajectory], tuple[str, ...]]:
        """One trajectory an image, owned by the current caller, and warnings about the LoRAs.

        Raises InvalidParameter and its kin for what only the resident models can tell.
        """
        adapters = self._load_adapters(request, models.pipeline)
        _check_controlnets(request, models)
        passes = PassBuilder(request, models, adapters, self._inversions).passes()
        settled, owner = request.settled, current_caller().owner
        trajectories = [
            Trajectory(passes, settled.seed + image, settled.preview_every, owner)
            for image in range(settled.num_images)
        ]
        return trajectories, tuple(w for lora in adapters for w in lora.adapter.warnings)

    def must_fetch(self, request: ResolvedRequest, models: ResidentModels) -> bool:
        """Whether `build` would fetch a LoRA from a URL, which may take long."""
        return any(
            self._adapters.must_fetch(models.pipeline, lora.source) for lora in request.loras
        )

    def absent_loras(self, request: ResolvedRequest) -> dict[str, HubFile]:
        """The LoRAs of the Hub, by name, that are not in memory: they must be fetched first."""
        sources = [lora.source for lora in request.loras]
        return {
            source.name: source.place
            for source in sources
            if isinstance(source.place, HubFile) and not self._adapters.holds(source)
        }

    def _load_adapters(
        self, request: ResolvedRequest, pipeline: Pipeline
    ) -> tuple[WeightedAdapter, ...]:
        return tuple(
            WeightedAdapter(
                self._adapters.get(pipeline, lora.source), lora.weight, lora.text_encoder_weight
            )
            for lora in request.loras
        )


_SHAPE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")


def _check_controlnets(request: ResolvedRequest, models: ResidentModels) -> None:
    """That every ControlNet's residuals fit the UNet: what only the networks themselves tell."""
    unet = models.pipeline.unet.config
    for i, network in enumerate(models.controlnets):
        own = network.module.config
        if wrong := [name for name in _SHAPE if own.get(name) != unet.get(name)]:
            raise InvalidParameter(
                f"ControlNet {network.spec.name} does not fit model {request.spec.name}: its "
                f"{wrong[0]} is {own.get(wrong[0])}, not {unet.get(wrong[0])}",
                param=f"controlnet.{i}.type",
            )
