"""Prompts to embeddings, cached.

For a plain prompt of one chunk the result is that of the stock pipeline's `encode_prompt`. Each
prompt is encoded by itself, so that its embedding does not depend on the prompts it shares a batch
with. Runs on the engine's thread; tokens come from `tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from cachetools import LRUCache

from sdbento.lora.hooks import WeightedAdapter, active_adapters
from sdbento.metrics.definitions import prompt_cache_total
from sdbento.models.device import upload
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.tokens import CHUNK, Chunk, TextEncoder, TokenizedPrompt, text_encoders

CACHE_SIZE = 256  # prompts a model; an SDXL one takes 0.3 MB a chunk in fp16

# The prompt, its number of chunks, and the LoRAs in the text encoders with their weights: by id, so
# that the cache does not keep an adapter in memory.
_Key = tuple[TokenizedPrompt, int, tuple[tuple[int, float], ...]]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the UNet reads of a prompt: `embeds` [1, 77 * chunks, D], for SDXL `pooled` [1, P]."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None


class PromptEncoder:
    """Encodes prompts, and keeps the last CACHE_SIZE embeddings of each model in memory.

    They are dropped together with their model.
    """

    def __init__(self) -> None:
        self._caches: WeakKeyDictionary[Pipeline, LRUCache[_Key, Conditioning]] = (
            WeakKeyDictionary()
        )

    def encode(
        self,
        pipeline: Pipeline,
        prompt: TokenizedPrompt,
        num_chunks: int,
        adapters: Sequence[WeightedAdapter] = (),
    ) -> Conditioning:
        """`prompt`, padded with empty chunks to `num_chunks`."""
        in_text_encoders = tuple(
            (used.adapter.id, used.text_encoder_weight)
            for used in adapters
            if used.adapter.parts.keys() - {"unet"}
        )
        key = (prompt, num_chunks, in_text_encoders)
        if (cache := self._caches.get(pipeline)) is None:
            cache = self._caches[pipeline] = LRUCache(CACHE_SIZE)
        conditioning = cache.get(key)
        prompt_cache_total.add("miss" if conditioning is None else "hit")
        if conditioning is None:
            conditioning = cache[key] = _encode(pipeline, prompt, num_chunks, adapters)
        return conditioning


def _encode(
    pipeline: Pipeline,
    prompt: TokenizedPrompt,
    num_chunks: int,
    adapters: Sequence[WeightedAdapter],
) -> Conditioning:
    embeds, pooled = [], None
    for encoder, chunks in zip(text_encoders(pipeline), prompt.chunks, strict=True):
        padded = (*chunks, *[Chunk()] * (num_chunks - len(chunks)))
        hidden, output = _run(encoder, padded, prompt.clip_skip, pipeline, adapters)
        embeds.append(_apply_weights(hidden, padded).flatten(0, 1)[None])
        pooled = output if output.ndim == 2 else pooled
    joined = torch.cat(embeds, dim=-1).to(pipeline.dtype)
    if not pipeline.is_sdxl:
        return Conditioning(joined, None)
    assert pooled is not None
    pooled = pooled[:1].to(pipeline.dtype)
    if prompt.is_absent and pipeline.pipe.config.get("force_zeros_for_empty_prompt", False):
        # SDXL base was trained with zeros, not with the embedding of "", for an absent prompt.
        return Conditioning(torch.zeros_like(joined), torch.zeros_like(pooled))
    return Conditioning(joined, pooled)


def _run(
    encoder: TextEncoder,
    chunks: Sequence[Chunk],
    clip_skip: int | None,
    pipeline: Pipeline,
    adapters: Sequence[WeightedAdapter],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states [chunks, 77, D] that the stock pipelines use, and the model's first output,
    which is pooled [chunks, P] if the model has a projection."""
    ids = [_token_ids(chunk, encoder.tokenizer) for chunk in chunks]
    mask = None
    if not pipeline.is_sdxl and getattr(encoder.model.config, "use_attention_mask", False):
        read = [[i < len(chunk.tokens) + 2 for i in range(len(ids[0]))] for chunk in chunks]
        mask = upload(read, torch.int64, pipeline.device)
    with (
        _inverted_tokens(encoder, chunks),
        active_adapters(encoder.model, encoder.part, [adapters] * len(chunks)),
    ):
        output = encoder.model(
            upload(ids, torch.int64, pipeline.device),
            attention_mask=mask,
            output_hidden_states=True,
        )
    if pipeline.is_sdxl:
        return output.hidden_states[-((clip_skip or 0) + 2)], output[0]
    if clip_skip is None:
        return output[0], output[0]
    hidden = _transformer(encoder.model).final_layer_norm(output.hidden_states[-(clip_skip + 1)])
    return hidden, output[0]


def _transformer(model: Any) -> Any:
    """The transformer of a CLIP text model, which some versions of transformers wrap."""
    return getattr(model, "text_model", model)


def _token_ids(chunk: Chunk, tokenizer: Any) -> list[int]:
    """77 of them: start, tokens, end, padding."""
    padding = [tokenizer.pad_token_id] * (CHUNK - len(chunk.tokens))
    return [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id, *padding]


@contextmanager
def _inverted_tokens(encoder: TextEncoder, chunks: Sequence[Chunk]) -> Iterator[None]:
    """While active, the token embedding gives the vectors of textual inversions in their places."""
    if not any(chunk.vectors for chunk in chunks):
        yield
        return

    def replace(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for row, chunk in enumerate(chunks):
            for vector in chunk.vectors:
                learned = vector.inversion.vectors[encoder.index][vector.row]
                output[row, 1 + vector.position] = learned.to(output)
        return output

    embedding = _transformer(encoder.model).embeddings.token_embedding
    hook = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _apply_weights(hidden: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Multiply each token's embedding by its weight, then scale the chunk so that its mean is what
    it was before."""
    for row, chunk in enumerate(chunks):
        if all(weight == 1.0 for weight in chunk.weights):
            continue
        rest = [1.0] * (hidden.shape[1] - 1 - len(chunk.weights))
        weights = upload([1.0, *chunk.weights, *rest], torch.float32, hidden.device)
        weighted = hidden[row].float() * weights[:, None]
        kept = hidden[row].float().mean() / weighted.mean()
        weighted *= torch.where(_has_mean(weighted), kept, 1.0)
        hidden = torch.cat([hidden[:row], weighted[None].to(hidden), hidden[row + 1 :]])
    return hidden


def _has_mean(values: torch.Tensor) -> torch.Tensor:
    """Whether the mean is more than a rounding error, as it is after a layer norm without bias."""
    return values.mean().abs() > 1e-6 * values.abs().mean()
