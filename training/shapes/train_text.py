"""Teaches the text encoder of the `shapes` model to read captions, before there are any images.

From every token after a caption's end a linear probe has to name shape, colour, background and
size. Learnt through the UNet alone, words bind to colours late; with this they bind in a tenth of
the steps. The probes are thrown away; the UNet's training goes on from the encoder.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from draw import COLOURS, RADII, SHAPES, SIZE_WORDS, Rng, caption_of, sample_scene
from draw import default_background as default
from text import HIDDEN, build_captions_tokenizer, build_text_encoder
from training.tokenizer import MAX_TOKENS

OUT = Path(__file__).parent / "out"
BATCH = 64
UNSAID = "unsaid"
ANSWERS = {
    "shape": SHAPES,
    "colour": (*COLOURS, UNSAID),
    "background": tuple(COLOURS),
    "size": (*RADII, UNSAID),
}


def sample_question(rng: Rng) -> tuple[str, list[int]]:
    """A caption and the index of the right answer to each of ANSWERS."""
    named = rng.random() < 0.7
    scene = sample_scene(rng, named)
    caption = caption_of(scene, rng, named)
    words = set(caption.replace(",", "").split())
    said_size = any(word in words for word in SIZE_WORDS[scene.size])
    # A colour can be named as the background's only; the two always differ.
    said = {
        "shape": scene.shape,
        "colour": scene.colour if scene.colour in words else UNSAID,
        "background": scene.background if named else default(scene.colour),
        "size": scene.size if said_size else UNSAID,
    }
    return caption, [ANSWERS[name].index(said[name]) for name in ANSWERS]


def batches(tokenizer: CLIPTokenizer, count: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` times tokens (BATCH, 77) and right answers (BATCH, 4)."""
    rng = np.random.default_rng(5)
    for _ in range(count):
        captions, answers = zip(*(sample_question(rng) for _ in range(BATCH)), strict=True)
        tokens = tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS).input_ids
        yield torch.tensor(tokens, device=device), torch.tensor(answers, device=device)


def read(encoder: CLIPTextModel, probes: nn.ModuleDict, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of every probe at each token after the caption's end, (n, answers)."""
    ends = tokens == encoder.config.eos_token_id  # padding is the end token, too
    states = encoder(tokens).last_hidden_state[ends]
    return {name: probe(states) for name, probe in probes.items()}


def train(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, steps: int, device: str) -> None:
    probes = nn.ModuleDict({name: nn.Linear(HIDDEN, len(a)) for name, a in ANSWERS.items()})
    parameters = [*encoder.parameters(), *probes.to(device).parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    started = time.monotonic()
    for step, (tokens, answers) in enumerate(batches(tokenizer, steps, device), start=1):
        repeats = (tokens == encoder.config.eos_token_id).sum(dim=1)
        right = answers.repeat_interleave(repeats, dim=0)
        logits = read(encoder, probes, tokens)
        losses = [F.cross_entropy(logits[name], right[:, i]) for i, name in enumerate(ANSWERS)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            guesses = torch.stack([logits[name].argmax(dim=1) for name in ANSWERS], dim=1)
            accuracy = (guesses == right).float().mean(dim=0).tolist()
            print(f"step {step} {accuracy} {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(3)
    tokenizer = build_captions_tokenizer()
    encoder = build_text_encoder(tokenizer).to(options.device)
    train(encoder, tokenizer, options.steps, options.device)
    torch.save(encoder.state_dict(), OUT / "text_encoder.pt")


if __name__ == "__main__":
    main()
