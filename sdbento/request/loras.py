"""Decides which LoRAs a request means: those it lists and those named by tags in its prompt.

If a tag's name is not known and exactly one LoRA is listed, the tag means that one, and their
weights multiply. This is how the worker's page uses the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdbento.errors import InvalidParameter
from sdbento.lora.lookup import is_known, nearest
from sdbento.prompts.syntax import LoraTag
from sdbento.request.schema import MAX_LORAS, LoraInput
from sdbento.settings import Settings


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA by name, with its weights in the UNet and in the text encoders."""

    name: str
    weight: float
    text_encoder_weight: float


def choose_loras(
    listed: Sequence[LoraInput], tags: Sequence[LoraTag], settings: Settings
) -> list[ChosenLora]:
    """Raises InvalidParameter, naming the nearest names, for a tag that means nothing."""
    chosen = [_listed(lora) for lora in listed]
    named = []
    for tag in tags:
        if is_known(tag.name, settings):
            named.append(ChosenLora(tag.name, tag.weight, tag.text_encoder_weight))
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
    return chosen


def _listed(lora: LoraInput) -> ChosenLora:
    own = lora.text_encoder_weight
    return ChosenLora(lora.model_id, lora.weight, lora.weight if own is None else own)


def _times(lora: ChosenLora, tag: LoraTag) -> ChosenLora:
    return ChosenLora(
        lora.name,
        lora.weight * tag.weight,
        lora.text_encoder_weight * tag.text_encoder_weight,
    )
