"""Teaches the text encoder of `emoji` what captions look like, before the UNet is trained.

A UNet that learns names from noise alone needs millions of pictures. A text encoder costs a
tenth of a UNet, and learns without noise: of a caption it tells the latents of the picture, in
the last tokens of its output (`told`). What it tells is blurred, and the UNet, which sees it by
cross-attention, makes a picture of it. A run that was cut off goes on from out/text_encoder.pt.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from training.emoji.budget import Budget, Training, arguments, autocast, take_start
from training.emoji.networks import FULL, TOY, Scale, build_text_encoder
from training.emoji.pool import Pool, composed, encode, load_pool, prepare, sample_scenes

PEAK_RATE, MATRIX_RATE, DECAY = 1e-3, 6e-3, 0.998
"""The matrices learn by Muon; with AdamW, three times as many captions teach as much."""
UNSEEN = 256
PATCH = 4
"""A token tells so many latents in each direction."""


def told(context: Tensor, side: int) -> Tensor:
    """What the text encoder's output (n, 77, width) tells: latents (n, 4, side, side).

    Row by row, each of the last tokens tells a patch in its first channels. They stand behind
    the caption, unless that is very long, and see all of it.
    """
    count = (side // PATCH) ** 2
    patches = context[:, -count:, : 4 * PATCH**2].transpose(1, 2)
    return F.fold(patches, side, kernel_size=PATCH, stride=PATCH)


def build(out: Path, scale: Scale) -> CLIPTextModel:
    network = build_text_encoder(scale, CLIPTokenizer.from_pretrained(out / "tokenizer"))
    take_start(network, out / "text_encoder.start.pt")
    return network


def training_of(network: CLIPTextModel, out: Path) -> Training:
    return Training(network, PEAK_RATE, out / "text_encoder.pt", DECAY, MATRIX_RATE)


def load(out: Path, scale: Scale, device: str) -> CLIPTextModel:
    """The trained text encoder with averaged weights."""
    network = build(out, scale).to(device)
    training_of(network, out).use_averages()
    return network.requires_grad_(False).eval()


def loss_of(network: CLIPTextModel, pool: Pool, batch: int, device: str) -> Tensor:
    latents, tokens = pool.batch(batch, unsaid=0.0)
    with autocast(device):
        context = network(tokens).last_hidden_state
    return F.mse_loss(told(context.float(), latents.shape[-1]), latents)


def train(out: Path, scale: Scale, budget: Budget, device: str, compiled: bool) -> None:
    began = time.monotonic()
    torch.manual_seed(3)
    pool = load_pool(out, device)
    network = build(out, scale).to(device)
    training = training_of(network, out)
    torch.manual_seed(training.step)
    network.set_attn_implementation("eager")  # with so few tokens faster, most of all on a CPU
    if compiled:
        network.compile()
    left = Budget(budget.seconds - (time.monotonic() - began), budget.min_steps)
    batch = scale.text_batch
    training.run(lambda: loss_of(network, pool, batch, device), batch, left)
    measure(load(out, scale, device), out, pool.empty)


@torch.no_grad()
def measure(network: CLIPTextModel, out: Path, empty: Tensor) -> None:
    """Prints what the network tells of the variance of scenes that it has not seen.

    Those without a caption, whose tokens are those of an `empty` one (1, 77), are left out.
    """
    device = empty.device.type
    layout, tokens = sample_scenes(out, UNSEEN, seed=77)
    latents = encode(out, composed(out, layout, device), device).float()
    tokens = tokens.to(device)
    found = told(network(tokens.long()).last_hidden_state, latents.shape[-1])
    said = (tokens != empty).any(dim=1)
    error, variance = F.mse_loss(found[said], latents[said]), latents[said].var()
    print(f"explains {1 - float(error / variance):.0%} of the variance of unseen scenes")


def main() -> None:
    parser = arguments(__doc__, minutes=30.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="only make the captions")
    parser.add_argument("--scenes", type=int, help="pictures with captions that are made")
    parser.add_argument("--seed", type=int, default=2, help="of the captions")
    options = parser.parse_args()
    scale = TOY if options.toy else FULL
    scale = replace(
        scale,
        text_batch=options.batch or scale.text_batch,
        scenes=options.scenes or scale.scenes,
    )
    if options.prepare:
        prepare(options.out, scale, options.seed)
        return
    train(options.out, scale, Budget(options.minutes * 60), options.device, options.compile)


if __name__ == "__main__":
    main()
