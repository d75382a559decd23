from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from sdbento.errors import InvalidParameter
from sdbento.lora.hooks import WeightedAdapter
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.encoder import Conditioning, PromptEncoder
from sdbento.prompts.tokens import TokenizedPrompt, tokenize
from tests.support.loras import cache_of, everything, make_lora, save_peft
from tests.support.metrics import counted
from tests.support.oracle import tiny_model

FAMILIES = ["sd15", "sd21", "sdxl"]


def encoded(model: Pipeline, text: str | None, num_chunks: int = 1, **options: Any) -> Conditioning:
    return PromptEncoder().encode(model, tokenize(model, text, **options), num_chunks)


def stock(model: Pipeline, text: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    embeds, _, *pooled = model.pipe.encode_prompt(
        prompt=text,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        **options,
    )
    return embeds, pooled[0] if pooled else None


def difference(one: Conditioning, other: Conditioning) -> float:
    return float((one.embeds - other.embeds).abs().max())


def num_tokens(prompt: TokenizedPrompt) -> list[int]:
    return [len(chunk.tokens) for chunk in prompt.chunks[0]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["a cat", "", "a dog, worried: 100% !", "word " * 20])
def test_a_plain_prompt_is_embedded_as_by_the_stock_pipeline(family: str, text: str) -> None:
    model = tiny_model(family)
    ours, (embeds, pooled) = encoded(model, text), stock(model, text)
    assert torch.equal(ours.embeds, embeds)
    assert (ours.pooled is None) == (pooled is None)
    if ours.pooled is not None and pooled is not None:
        assert torch.equal(ours.pooled, pooled)


def test_the_refiner_reads_with_the_second_encoder_only() -> None:
    model = tiny_model("sdxl-refiner")
    ours, (embeds, pooled) = encoded(model, "a cat"), stock(model, "a cat")
    assert torch.equal(ours.embeds, embeds)
    assert ours.pooled is not None and pooled is not None and torch.equal(ours.pooled, pooled)


def test_sdxl_has_a_second_prompt() -> None:
    model = tiny_model("sdxl")
    ours, (embeds, _) = (
        encoded(model, "a cat", text_2="a dog"),
        stock(model, "a cat", prompt_2="a dog"),
    )
    assert torch.equal(ours.embeds, embeds)
    with pytest.raises(InvalidParameter, match="SDXL"):
        tokenize(tiny_model("sd15"), "a cat", text_2="a dog")


def test_an_absent_negative_prompt_is_zeros_where_the_model_was_trained_so() -> None:
    absent = encoded(tiny_model("sdxl"), None, 2)
    assert absent.embeds.shape[1] == 2 * 77
    assert absent.pooled is not None
    assert not absent.embeds.any() and not absent.pooled.any()
    assert torch.equal(
        encoded(tiny_model("sd15"), None).embeds, encoded(tiny_model("sd15"), "").embeds
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_clip_skip_takes_an_earlier_layer(family: str) -> None:
    model = tiny_model(family)
    skipped = encoded(model, "a cat", clip_skip=1)
    if family == "sdxl":
        assert torch.equal(skipped.embeds, stock(model, "a cat", clip_skip=1)[0])
        return
    # The stock pipelines' own lines, which fail with this version of transformers.
    ids = model.pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    states = model.pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    assert torch.equal(skipped.embeds, model.pipe.text_encoder.final_layer_norm(states[-2]))


def test_a_long_prompt_goes_on_in_chunks_of_75_tokens() -> None:
    model = tiny_model("sd15")
    prompt = tokenize(model, "cat " * 160)
    assert num_tokens(prompt) == [75, 75, 10]
    embeds = encoded(model, "cat " * 160, prompt.num_chunks).embeds
    assert embeds.shape == (1, 77 * 3, 32)
    first = encoded(model, "cat " * 75).embeds
    assert torch.allclose(embeds[:, :77], first, atol=1e-6)


def test_a_short_prompt_is_padded_with_empty_chunks() -> None:
    model = tiny_model("sd15")
    padded = encoded(model, "a cat", 2).embeds
    assert torch.allclose(padded[:, :77], encoded(model, "a cat").embeds, atol=1e-6)
    assert torch.allclose(padded[:, 77:], encoded(model, "").embeds, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_multiply_and_the_mean_stays(family: str) -> None:
    model = tiny_model(family)
    plain, heavy = encoded(model, "a cat"), encoded(model, "a (cat:1.5)")
    assert difference(plain, heavy) > 0.01
    start = torch.equal(encoded(model, "a cat").embeds, encoded(model, "(a cat:1.0)").embeds)
    assert start
    if family != "sdxl":
        assert torch.allclose(heavy.embeds.mean(), plain.embeds.mean(), atol=1e-5)
        ratio = heavy.embeds / plain.embeds
        rescaled = ratio[0, 0].median()
        assert torch.allclose(ratio[0, 2] / rescaled, torch.tensor(1.5), atol=1e-3)


def test_weights_multiply_where_there_is_no_mean_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("sd15")
    bias = model.pipe.text_encoder.final_layer_norm.bias
    monkeypatch.setattr(bias, "data", torch.zeros_like(bias))  # leaves rounding errors of a mean
    plain, heavy = encoded(model, "a cat").embeds, encoded(model, "a (cat:1.5)").embeds
    assert torch.allclose(heavy[0, 2], 1.5 * plain[0, 2])
    assert torch.equal(heavy[0, :2], plain[0, :2])


def test_equal_prompts_are_encoded_once_and_the_cache_dies_with_the_model() -> None:
    model = tiny_model("sd15")
    encoder, before = PromptEncoder(), counted()
    first = encoder.encode(model, tokenize(model, "a cat"), 1)
    assert encoder.encode(model, tokenize(model, "a cat"), 1) is first
    assert encoder.encode(model, tokenize(model, "a (cat)"), 1) is not first
    assert counted().since(before) == {
        "sdbento_prompt_cache_total{result=hit}": 1,
        "sdbento_prompt_cache_total{result=miss}": 2,
    }
    remembered = weakref.ref(first)
    del model, first
    gc.collect()
    assert remembered() is None


def test_loras_reach_the_text_encoder_and_the_cache_does_not_keep_them(tmp_path: Path) -> None:
    model = tiny_model("sd15")
    save_peft("sd15", make_lora("sd15", marks=everything("sd15")), tmp_path / "style.safetensors")
    adapter = cache_of(tmp_path).get(model, "style")
    encoder, prompt = PromptEncoder(), tokenize(model, "a cat")
    plain = encoder.encode(model, prompt, 1)
    full = encoder.encode(model, prompt, 1, [WeightedAdapter(adapter, 1.0, 1.0)])
    assert difference(plain, full) > 0.01
    none = encoder.encode(model, prompt, 1, [WeightedAdapter(adapter, 1.0, 0.0)])
    assert difference(plain, none) < 1e-6
    remembered = weakref.ref(adapter)
    del adapter
    gc.collect()
    assert remembered() is None
