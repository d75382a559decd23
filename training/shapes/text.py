"""The tokenizer and the text encoder of the `shapes` model."""

import numpy as np
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from draw import NEGATIVES, sample_drawing
from training.tokenizer import MAX_TOKENS, build_tokenizer

HIDDEN = 96
NUM_MERGES = 320


def _corpus(count: int) -> list[str]:
    rng = np.random.default_rng(7)
    return [sample_drawing(rng)[1] for _ in range(count)] + list(NEGATIVES) * 20


def build_captions_tokenizer() -> CLIPTokenizer:
    """The tokenizer with merges from captions and negative prompts."""
    return build_tokenizer(_corpus(4000), NUM_MERGES)


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
