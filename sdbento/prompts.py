"""Prompts to embeddings, by the text encoders of the leased pipeline, cached.

Each text is encoded by itself, never in a batch, so that its embedding does not depend on its
company. Runs on the engine's thread, like everything that computes on the device.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from sdbento.pipelines import Pipeline

CACHE_SIZE = 256  # texts a model; an SDXL one takes 0.3 MB in fp16


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the UNet reads of one text: `embeds` [1, 77, D], and for SDXL `pooled` [1, P]."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None
    warning: str | None = None


class PromptEncoder:
    """Encodes texts, keeping the last CACHE_SIZE of every resident model; eviction drops them."""

    def __init__(self) -> None:
        self._caches: WeakKeyDictionary[Pipeline, OrderedDict[str | None, Conditioning]] = (
            WeakKeyDictionary()
        )

    def encode(self, pipeline: Pipeline, text: str | None) -> Conditioning:
        """`text` None is a negative prompt that was not given: zeros where the model wants that."""
        cache = self._caches.setdefault(pipeline, OrderedDict())
        conditioning = cache.get(text)
        if conditioning is None:
            conditioning = cache[text] = _encode(pipeline, text)
            if len(cache) > CACHE_SIZE:
                cache.popitem(last=False)
        cache.move_to_end(text)
        return conditioning


def _encode(pipeline: Pipeline, text: str | None) -> Conditioning:
    if text is None:
        return _encode_absent(pipeline)
    embeds, _, *pooled = pipeline.pipe.encode_prompt(
        prompt=text,
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    warning = _truncation_warning(pipeline, text)
    return Conditioning(embeds, pooled[0] if pooled else None, warning)


def _encode_absent(pipeline: Pipeline) -> Conditioning:
    """SDXL base was trained with zeros, not with the embedding of "", for an absent prompt."""
    empty = _encode(pipeline, "")
    if not pipeline.pipe.config.get("force_zeros_for_empty_prompt", False):
        return empty
    assert empty.pooled is not None  # only SDXL pipelines have that option
    return Conditioning(torch.zeros_like(empty.embeds), torch.zeros_like(empty.pooled))


def _truncation_warning(pipeline: Pipeline, text: str) -> str | None:
    tokenizer = pipeline.pipe.tokenizer
    limit = tokenizer.model_max_length - 2  # the start and end tokens take two places
    num_tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
    if num_tokens <= limit:
        return None
    return f"a prompt of {num_tokens} tokens was cut: the model reads the first {limit}"
