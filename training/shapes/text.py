"""The tokenizer and the text encoder of the `shapes` model.

The tokenizer is CLIP's, byte-level, with merges learnt from captions: it knows the captions' words
as single tokens and still spells out any other text.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from draw import NEGATIVES, sample_drawing

MAX_TOKENS = 77
HIDDEN = 96
NUM_MERGES = 320
START, END = "<|startoftext|>", "<|endoftext|>"


def _corpus(count: int) -> list[str]:
    rng = np.random.default_rng(7)
    return [sample_drawing(rng)[1] for _ in range(count)] + list(NEGATIVES) * 20


def _learn_merges(alphabet: list[str]) -> list[tuple[str, str]]:
    seeds = {token: i for i, token in enumerate([*alphabet, START, END])}
    budget = len(alphabet) + NUM_MERGES
    learnt = CLIPTokenizer(vocab=seeds).train_new_from_iterator(_corpus(4000), budget)
    merges = json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with all 256 bytes, alone and ending a word, and merges from captions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(alphabet)
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens = [*dict.fromkeys(tokens), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Adds the two files that older tokenizers read to those of `save_pretrained`."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text model with two layers; trained together with the UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
