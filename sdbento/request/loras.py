"""Decides which LoRAs a request means: those it lists and those named by tags in its prompt.

If a tag's name is not known and exactly one LoRA is listed, the tag means that one, and their
weights multiply. This is how the worker's page uses the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdbento.catalog.specs import ModelSpec
from sdbento.errors import InvalidParameter
from sdbento.lora.check import locate_loras
from sdbento.lora.lookup import LoraSource, is_known, nearest
from sdbento.prompts.syntax import LoraTag
from sdbento.request.schema import MAX_LORAS, LoraInput
from sdbento.settings import Settings


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA, with its weights in the UNet and in the text encoders."""

    source: LoraSource
    weight: float
    text_encoder_weight: float


@dataclass(frozen=True)
class _Named:
    """A ChosenLora by its name."""

    name: str
    weight: float
    text_encoder_weight: float


def choose_loras(
    listed: Sequence[LoraInput], tags: Sequence[LoraTag], spec: ModelSpec, settings: Settings
) -> list[ChosenLora]:
    """For a model like `spec`. Blocking: looks at this machine's disk.

    Raises InvalidParameter, naming the nearest names, for a tag that means nothing; and what
    `locate_loras` raises.
    """
    chosen = [_listed(lora) for lora in listed]
    named = []
    for tag in tags:
        if is_known(tag.name, settings):
            named.append(_Named(tag.name, tag.weight, tag.text_encoder_weight))
        elif len(listed) == 1:
            chosen = [_times(chosen[0], tag)]
        else:
            raise InvalidParameter(
                f"<lora:{tag.name}> in the prompt: there is no LoRA of that name"
                f"{nearest(tag.name, settings)}",
                param="prompt",
            )
    chosen += named
    if len(chosen) > MAX_LORAS:
        raise InvalidParameter(
            f"at most {MAX_LORAS} LoRAs may be used at once; given: {len(chosen)}", param="lora"
        )
    sources = locate_loras([lora.name for lora in chosen], spec, settings)
    return [
        ChosenLora(source, lora.weight, lora.text_encoder_weight)
        for source, lora in zip(sources, chosen, strict=True)
    ]


def _listed(lora: LoraInput) -> _Named:
    own = lora.text_encoder_weight
    return _Named(lora.model_id, lora.weight, lora.weight if own is None else own)


def _times(lora: _Named, tag: LoraTag) -> _Named:
    return _Named(
        lora.name,
        lora.weight * tag.weight,
        lora.text_encoder_weight * tag.text_encoder_weight,
    )
