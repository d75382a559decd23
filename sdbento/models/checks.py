"""Whether a model that has been loaded is complete and can be used.

diffusers and transformers load some incomplete files without a word. Without these checks the
fault would only show later: tensors without data, or a tokenizer that gives the same image for
every prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdbento.catalog.families import LATENT_CHANNELS, VAE_FACTOR, refusal
from sdbento.catalog.specs import ModelSpec, Spec
from sdbento.errors import ModelLoadFailed

KNOWN_SHARE = 0.9  # of a text encoder's embeddings that have a token; a few may be padding
WORD_END, NUM_WORDS = "</w>", 20


def check_pipeline(spec: ModelSpec, pipe: Any) -> None:
    """Weights, tokenizers and the size of latents. Raises ModelLoadFailed or UnsupportedModel."""
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            check_complete(spec, name, module)
    for suffix in ("", "_2"):
        if getattr(pipe, f"text_encoder{suffix}", None) is not None:
            _check_tokenizer(spec, pipe, suffix)
    if pipe.vae_scale_factor != VAE_FACTOR:
        raise refusal(spec.name, f"its VAE shrinks by {pipe.vae_scale_factor}, not {VAE_FACTOR}")
    if (channels := pipe.vae.config.latent_channels) != LATENT_CHANNELS:
        raise refusal(spec.name, f"its VAE has {channels} latent channels, not {LATENT_CHANNELS}")


def check_complete(spec: Spec, name: str, module: torch.nn.Module) -> None:
    """Raises ModelLoadFailed if weights are missing, which leaves their tensors without data.

    Unnoticed, this would fail later with "Cannot copy out of meta tensor; no data!".
    """
    if missing := [key for key, tensor in module.named_parameters() if tensor.is_meta]:
        raise ModelLoadFailed(
            f"{spec}: {len(missing)} weights of its {name} are not in the file, {missing[0]} the "
            "first"
        )


def _check_tokenizer(spec: ModelSpec, pipe: Any, suffix: str) -> None:
    """That the tokenizer tells words apart, as an empty one does not, and fits the encoder."""
    tokenizer = getattr(pipe, f"tokenizer{suffix}")
    encoder = getattr(pipe, f"text_encoder{suffix}")
    vocabulary, known = tokenizer.get_vocab(), encoder.get_input_embeddings().num_embeddings
    most, length = max(vocabulary.values(), default=0), encoder.config.max_position_embeddings
    fault = None
    if most >= known:
        fault = f"has token {most}, but its text_encoder{suffix} knows {known} only"
    elif len(vocabulary) < KNOWN_SHARE * known:
        fault = f"has {len(vocabulary)} tokens of the {known} that its text_encoder{suffix} knows"
    elif not _reads_words(tokenizer, vocabulary):
        fault = "does not read the words of its own vocabulary: merges are missing"
    elif tokenizer.model_max_length > length:
        fault = f"has no limit of {length} tokens: its tokenizer_config.json is incomplete"
    if fault:
        raise ModelLoadFailed(f"{spec}: its tokenizer{suffix} {fault}")


def _reads_words(tokenizer: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether any of the words that byte pair encoding merged last becomes a single token."""
    words = sorted(
        (token, word)
        for text, token in vocabulary.items()
        if (word := text.removesuffix(WORD_END)) != text
        and word.isascii()
        and word.isalpha()
        and len(word) > 1
    )[-NUM_WORDS:]
    return any(
        tokenizer(word, add_special_tokens=False).input_ids == [token] for token, word in words
    )
