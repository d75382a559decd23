"""Prompts to embeddings: tokens in chunks, weights, textual inversions; cached.

`prepare` turns a text into token chunks, on any thread; `PromptEncoder` runs the text encoders, on
the engine's thread. For a plain prompt of one chunk the result is that of the stock pipeline's
`encode_prompt`; longer ones, which stock cuts, go on in further chunks of 75 tokens. Each prompt is
encoded by itself, so that its embedding does not depend on its company.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from sdbento.errors import InvalidParameter
from sdbento.lora.hooks import WeightedAdapter, applied
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.check import check_second_prompt
from sdbento.prompts.inversions import Inversion, Inversions
from sdbento.prompts.syntax import parse_attention

CACHE_SIZE = 256  # prompts a model; an SDXL one takes 0.3 MB a chunk in fp16
MAX_CHUNKS = 10
CHUNK = 75  # tokens; the start and the end token make it 77

_tokenizing = threading.Lock()  # Hugging Face's tokenizers are not thread-safe


@dataclass(frozen=True)
class Vector:
    """A textual inversion's vector in a token's place."""

    position: int  # in the chunk, without the start token
    inversion: Inversion
    row: int


@dataclass(frozen=True)
class Chunk:
    """At most CHUNK tokens with their weights."""

    tokens: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    vectors: tuple[Vector, ...] = ()


@dataclass(frozen=True)
class PreparedPrompt:
    """One prompt as each of the model's text encoders reads it."""

    chunks: tuple[tuple[Chunk, ...], ...]  # by text encoder
    clip_skip: int | None = None
    is_absent: bool = False  # a negative prompt that was not given

    @property
    def num_chunks(self) -> int:
        return max((len(chunks) for chunks in self.chunks), default=1)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the UNet reads of a prompt: `embeds` [1, 77 * chunks, D], for SDXL `pooled` [1, P]."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Encoder:
    """A text encoder with its tokenizer; `index` is its place in SDXL: 0 or 1."""

    part: str
    index: int
    model: Any
    tokenizer: Any


def _encoders(pipeline: Pipeline) -> list[_Encoder]:
    """SDXL has two, its refiner the second only, the others one."""
    pipe = pipeline.pipe
    found = []
    for index, suffix in enumerate(("", "_2")):
        model = getattr(pipe, f"text_encoder{suffix}", None)
        if model is not None:
            tokenizer = getattr(pipe, f"tokenizer{suffix}")
            found.append(_Encoder(f"text_encoder{suffix}", index, model, tokenizer))
    return found


def prepare(
    pipeline: Pipeline,
    text: str | None,
    *,
    text_2: str | None = None,
    clip_skip: int | None = None,
    inversions: Inversions | None = None,
) -> PreparedPrompt:
    """`text` None is a negative prompt that was not given; `text_2` is for SDXL's second encoder.

    Thread-safe. Raises InvalidParameter for what is too long or does not fit the model.
    """
    encoders = _encoders(pipeline)
    if text_2 is not None:
        check_second_prompt(pipeline.spec)
    _check_clip_skip(encoders, clip_skip, pipeline)
    texts = [text or "", text or "" if text_2 is None else text_2]
    indices = [encoder.index for encoder in encoders]
    return PreparedPrompt(
        chunks=tuple(
            _chunks(texts[encoder.index], encoder, indices, inversions) for encoder in encoders
        ),
        clip_skip=clip_skip,
        is_absent=text is None,
    )


def _check_clip_skip(
    encoders: Sequence[_Encoder], clip_skip: int | None, pipeline: Pipeline
) -> None:
    layers = min(encoder.model.config.num_hidden_layers for encoder in encoders)
    most = layers - (1 if pipeline.is_sdxl else 0)  # SDXL leaves out one layer anyway
    if clip_skip is not None and clip_skip > most:
        raise InvalidParameter(
            f"clip_skip must be at most {most} for {pipeline.spec.name}; given: {clip_skip}",
            param="clip_skip",
        )


def _chunks(
    text: str, encoder: _Encoder, encoders: Sequence[int], inversions: Inversions | None
) -> tuple[Chunk, ...]:
    """At least one chunk. BREAK closes one; an inversion is never divided."""
    done: list[Chunk] = []
    tokens: list[int] = []
    weights: list[float] = []
    vectors: list[Vector] = []

    def close() -> None:
        done.append(Chunk(tuple(tokens), tuple(weights), tuple(vectors)))
        for items in (tokens, weights, vectors):
            items.clear()

    for span in parse_attention(text):
        if span.text is None:
            close()
            continue
        for piece in inversions.split(span.text) if inversions else [span.text]:
            if isinstance(piece, Inversion):
                piece.check_encoders(encoders)
                width = encoder.model.config.hidden_size
                count = len(piece.for_encoder(encoder.index, width))
                if len(tokens) + count > CHUNK:
                    close()
                vectors += [Vector(len(tokens) + row, piece, row) for row in range(count)]
                # Never looked up. Not the end token: the pooled output is read at the first one.
                ids = [0] * count
            else:
                with _tokenizing:
                    ids = encoder.tokenizer(
                        piece, add_special_tokens=False, verbose=False
                    ).input_ids
            for token in ids:
                if len(tokens) == CHUNK:
                    close()
                tokens.append(token)
                weights.append(span.weight)
    if tokens or not done:
        close()
    if len(done) > MAX_CHUNKS:
        count = sum(len(chunk.tokens) for chunk in done)
        raise InvalidParameter(
            f"a prompt may have at most {MAX_CHUNKS} chunks of {CHUNK} tokens; given: {len(done)} "
            f"with {count} tokens",
            param="prompt",
        )
    return tuple(done)


class PromptEncoder:
    """Encodes prompts, keeping the last CACHE_SIZE of every resident model; eviction drops them."""

    def __init__(self) -> None:
        self._caches: WeakKeyDictionary[Pipeline, OrderedDict[Any, Conditioning]] = (
            WeakKeyDictionary()
        )

    def encode(
        self,
        pipeline: Pipeline,
        prompt: PreparedPrompt,
        num_chunks: int,
        adapters: Sequence[WeightedAdapter] = (),
    ) -> Conditioning:
        """`prompt`, padded with empty chunks to `num_chunks`."""
        reading = tuple(
            # The id and not the adapter itself, which the cache must not keep alive.
            (used.adapter.id, used.text_encoder_weight)
            for used in adapters
            if used.adapter.parts.keys() - {"unet"}
        )
        key = (prompt, num_chunks, reading)
        cache = self._caches.setdefault(pipeline, OrderedDict())
        conditioning = cache.get(key)
        if conditioning is None:
            conditioning = cache[key] = _encode(pipeline, prompt, num_chunks, adapters)
            if len(cache) > CACHE_SIZE:
                cache.popitem(last=False)
        cache.move_to_end(key)
        return conditioning


def _encode(
    pipeline: Pipeline,
    prompt: PreparedPrompt,
    num_chunks: int,
    adapters: Sequence[WeightedAdapter],
) -> Conditioning:
    embeds, pooled = [], None
    for encoder, chunks in zip(_encoders(pipeline), prompt.chunks, strict=True):
        padded = (*chunks, *[Chunk()] * (num_chunks - len(chunks)))
        hidden, first = _run(encoder, padded, prompt.clip_skip, pipeline, adapters)
        embeds.append(_weigh(hidden, padded).flatten(0, 1)[None])
        pooled = first if first.ndim == 2 else pooled
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
    encoder: _Encoder,
    chunks: Sequence[Chunk],
    clip_skip: int | None,
    pipeline: Pipeline,
    adapters: Sequence[WeightedAdapter],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [chunks, 77, D] as the stock pipelines take them, and the model's first output:
    pooled [chunks, P] where it projects."""
    ids = torch.tensor([_padded(chunk, encoder.tokenizer) for chunk in chunks])
    mask = None
    if not pipeline.is_sdxl and getattr(encoder.model.config, "use_attention_mask", False):
        lengths = torch.tensor([len(chunk.tokens) + 2 for chunk in chunks])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(pipeline.device)
    with (
        _vectors_in_place(encoder, chunks),
        applied(encoder.model, encoder.part, [adapters] * len(chunks)),
    ):
        output = encoder.model(
            ids.to(pipeline.device), attention_mask=mask, output_hidden_states=True
        )
    if pipeline.is_sdxl:
        return output.hidden_states[-((clip_skip or 0) + 2)], output[0]
    if clip_skip is None:
        return output[0], output[0]
    hidden = _core(encoder.model).final_layer_norm(output.hidden_states[-(clip_skip + 1)])
    return hidden, output[0]


def _core(model: Any) -> Any:
    """The transformer of a CLIP text model, which some versions wrap."""
    return getattr(model, "text_model", model)


def _padded(chunk: Chunk, tokenizer: Any) -> list[int]:
    room = CHUNK - len(chunk.tokens)
    padding = [tokenizer.pad_token_id] * room
    return [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id, *padding]


@contextmanager
def _vectors_in_place(encoder: _Encoder, chunks: Sequence[Chunk]) -> Iterator[None]:
    """Let the token embedding give the inversions' vectors at their places."""
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

    embedding = _core(encoder.model).embeddings.token_embedding
    hook = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _weigh(hidden: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Multiply each token's embedding by its weight, and give each chunk its old mean back."""
    for row, chunk in enumerate(chunks):
        if all(weight == 1.0 for weight in chunk.weights):
            continue
        rest = [1.0] * (hidden.shape[1] - 1 - len(chunk.weights))
        weights = torch.tensor([1.0, *chunk.weights, *rest], device=hidden.device)
        weighed = hidden[row].float() * weights[:, None]
        if _has_mean(weighed):
            weighed *= hidden[row].float().mean() / weighed.mean()
        hidden = torch.cat([hidden[:row], weighed[None].to(hidden), hidden[row + 1 :]])
    return hidden


def _has_mean(values: torch.Tensor) -> bool:
    """Whether their mean is more than rounding errors, as after a layer norm without a bias."""
    return bool(values.mean().abs() > 1e-6 * values.abs().mean())
