"""Prompts as tokens: chunks that a text encoder can read, with weights and textual inversions.

The stock pipelines cut a prompt after 75 tokens; here it goes on in further chunks of 75. Runs no
network, so that `tokenize` may run on any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdbento.errors import InvalidParameter
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.check import check_second_prompt
from sdbento.prompts.inversions import Inversion, Inversions
from sdbento.prompts.syntax import parse_attention

MAX_CHUNKS = 10
CHUNK = 75  # tokens; the start and the end token make it 77

_tokenizing = threading.Lock()  # Hugging Face's tokenizers are not thread-safe


@dataclass(frozen=True)
class Vector:
    """A vector of a textual inversion, which takes a token's place."""

    position: int  # in the chunk, not counting the start token
    inversion: Inversion
    row: int


@dataclass(frozen=True)
class Chunk:
    """At most CHUNK tokens with their weights."""

    tokens: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    vectors: tuple[Vector, ...] = ()


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt as the model's text encoders read it."""

    chunks: tuple[tuple[Chunk, ...], ...]  # one tuple of chunks a text encoder
    clip_skip: int | None = None
    is_absent: bool = False  # a negative prompt that was not given

    @property
    def num_chunks(self) -> int:
        return max((len(chunks) for chunks in self.chunks), default=1)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A text encoder with its tokenizer; `index` is 0, or 1 for the second one of SDXL."""

    part: str  # its name in the pipeline
    index: int
    model: Any
    tokenizer: Any


def text_encoders(pipeline: Pipeline) -> list[TextEncoder]:
    """SDXL has two, its refiner only the second of them, other models one."""
    pipe = pipeline.pipe
    found = []
    for index, suffix in enumerate(("", "_2")):
        model = getattr(pipe, f"text_encoder{suffix}", None)
        if model is not None:
            tokenizer = getattr(pipe, f"tokenizer{suffix}")
            found.append(TextEncoder(f"text_encoder{suffix}", index, model, tokenizer))
    return found


def tokenize(
    pipeline: Pipeline,
    text: str | None,
    *,
    text_2: str | None = None,
    clip_skip: int | None = None,
    inversions: Inversions | None = None,
) -> TokenizedPrompt:
    """`text` None is a negative prompt that was not given; `text_2` is for SDXL's second encoder.

    Thread-safe. Raises InvalidParameter for a prompt that is too long or does not fit the model.
    """
    encoders = text_encoders(pipeline)
    if text_2 is not None:
        check_second_prompt(pipeline.spec)
    _check_clip_skip(encoders, clip_skip, pipeline)
    texts = [text or "", text or "" if text_2 is None else text_2]
    indices = [encoder.index for encoder in encoders]
    return TokenizedPrompt(
        chunks=tuple(
            _chunks(texts[encoder.index], encoder, indices, inversions) for encoder in encoders
        ),
        clip_skip=clip_skip,
        is_absent=text is None,
    )


def _check_clip_skip(
    encoders: Sequence[TextEncoder], clip_skip: int | None, pipeline: Pipeline
) -> None:
    layers = min(encoder.model.config.num_hidden_layers for encoder in encoders)
    most = layers - (1 if pipeline.is_sdxl else 0)  # SDXL leaves out one layer anyway
    if clip_skip is not None and clip_skip > most:
        raise InvalidParameter(
            f"clip_skip must be at most {most} for {pipeline.spec.name}; given: {clip_skip}",
            param="clip_skip",
        )


def _chunks(
    text: str, encoder: TextEncoder, encoders: Sequence[int], inversions: Inversions | None
) -> tuple[Chunk, ...]:
    """At least one chunk. `encoders`: the indices of all text encoders of the model."""
    chunks = _OpenChunk()
    for span in parse_attention(text):
        if span.text is None:  # BREAK
            chunks.close()
            continue
        for piece in inversions.split(span.text) if inversions else [span.text]:
            if isinstance(piece, Inversion):
                piece.check_encoders(encoders)
                width = encoder.model.config.hidden_size
                chunks.add_inversion(
                    piece, len(piece.for_encoder(encoder.index, width)), span.weight
                )
            else:
                chunks.add_tokens(_tokenize(piece, encoder), span.weight)
    return _bounded(chunks.finish())


def _tokenize(text: str, encoder: TextEncoder) -> list[int]:
    with _tokenizing:
        ids: list[int] = encoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _bounded(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    if len(chunks) > MAX_CHUNKS:
        count = sum(len(chunk.tokens) for chunk in chunks)
        raise InvalidParameter(
            f"a prompt may have at most {MAX_CHUNKS} chunks of {CHUNK} tokens; given: "
            f"{len(chunks)} with {count} tokens",
            param="prompt",
        )
    return chunks


class _OpenChunk:
    """The chunk that is being filled, after those that are full."""

    def __init__(self) -> None:
        self._closed: list[Chunk] = []
        self._tokens: list[int] = []
        self._weights: list[float] = []
        self._vectors: list[Vector] = []

    def add_tokens(self, tokens: Sequence[int], weight: float) -> None:
        for token in tokens:
            if len(self._tokens) == CHUNK:
                self.close()
            self._tokens.append(token)
            self._weights.append(weight)

    def add_inversion(self, inversion: Inversion, num_vectors: int, weight: float) -> None:
        """All vectors in one chunk: they have been learned side by side."""
        first = len(self._tokens)
        if first + num_vectors > CHUNK:
            self.close()
            first = 0
        self._vectors += [Vector(first + row, inversion, row) for row in range(num_vectors)]
        # Token 0 keeps the place and its embedding is replaced. It must not be the end token, since
        # the pooled output is read at the first of those.
        self.add_tokens([0] * num_vectors, weight)

    def close(self) -> None:
        self._closed.append(Chunk(tuple(self._tokens), tuple(self._weights), tuple(self._vectors)))
        for items in (self._tokens, self._weights, self._vectors):
            items.clear()

    def finish(self) -> tuple[Chunk, ...]:
        if self._tokens or not self._closed:
            self.close()
        return tuple(self._closed)
