"""CLIP's tokenizer, byte-level, with merges learnt from captions: it knows the captions' words as
single tokens and still spells out any other text. For all models that are trained here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(corpus: Iterable[str], merges: int) -> CLIPTokenizer:
    """CLIP's tokenizer with all 256 bytes, alone and ending a word, and `merges` learnt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    seeds = {token: i for i, token in enumerate([*alphabet, START, END])}
    learnt = CLIPTokenizer(vocab=seeds).train_new_from_iterator(corpus, len(alphabet) + merges)
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    pairs = [(left, right) for left, right in model["merges"]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens = [*dict.fromkeys(tokens + [left + right for left, right in pairs]), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Adds the two files that older tokenizers read to those of `save_pretrained`."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
