"""Prompts in chunks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sdbento.errors import InvalidParameter
from sdbento.prompts.tokens import MAX_CHUNKS, tokenize
from tests.support.oracle import tiny_model


def test_clip_skip_beyond_the_layers_names_the_limit() -> None:
    with pytest.raises(InvalidParameter, match="at most 2 for tiny-sd15; given: 3"):
        tokenize(tiny_model("sd15"), "a cat", clip_skip=3)


def test_break_begins_a_new_chunk() -> None:
    model = tiny_model("sd15")
    prompt = tokenize(model, "a cat BREAK a dog")
    assert [chunk.tokens for chunk in prompt.chunks[0]] == [
        tokenize(model, text).chunks[0][0].tokens for text in ("a cat", "a dog")
    ]


def test_a_prompt_of_too_many_chunks_names_the_limit() -> None:
    with pytest.raises(InvalidParameter, match=f"at most {MAX_CHUNKS} chunks of 75 tokens"):
        tokenize(tiny_model("sd15"), "word " * 2000)


def test_prompts_are_prepared_on_many_threads() -> None:
    model = tiny_model("sdxl")
    texts = [f"a cat number {i} (of:1.{i % 10}) many" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: tokenize(model, text), texts))
    assert together == [tokenize(model, text) for text in texts]
