"""Trains a LoRA (Hu et al. 2021) that draws the shapes of `shapes` in another style.

Captions are the ordinary ones: the weight of the LoRA alone decides how much of the style appears.
Needs the encoder of train_encoder.py in out/encoder.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from draw import STYLES
from finetune import OUT, Base, Finetuner, load_base, train
from train_encoder import ENCODER, painting_loss
from train_unet import (
    CAPTIONS_PER_DRAWING,
    Drawing,
    Pool,
    add_noise,
    sample_captions,
    tokenize,
    weighted_error,
)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2")
CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv", "conv_out")
"""With attention alone, 500 steps brought rough outlines and hardly any checkers."""
PEAK_RATE = 2e-3
DESCENT_STEPS, DESCENT_RATE = 10, 0.1


def find_latents(vae: AutoencoderKL, drawings: list[Drawing]) -> Tensor:
    """Scaled latents from which the decoder paints the drawings: the encoder's, then descent.

    The descent more than halves the squared error of outlines; strokes get their colours right.
    """
    pixels = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    latents.requires_grad_(True)
    optimizer = torch.optim.Adam([latents], DESCENT_RATE)
    schedule = LinearLR(optimizer, 1.0, 0.2, total_iters=DESCENT_STEPS)
    for _ in range(DESCENT_STEPS):
        loss = painting_loss(vae.decode(latents).sample, pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    scaled: Tensor = latents.detach() * vae.config.scaling_factor
    return scaled


def build_pool(base: Base, style: str, count: int) -> Pool:
    """Latents and captions of drawings in one style."""
    vae = AutoencoderKL.from_pretrained(ENCODER).eval().requires_grad_(False)
    vae = vae.to(memory_format=torch.channels_last)
    rng = np.random.default_rng(3)
    latents: list[Tensor] = []
    captions: list[str] = []
    for _ in range(0, count, 10):
        images, texts = sample_captions(rng, 10, style)
        latents.append(find_latents(vae, images))
        captions += texts
        if len(captions) % (100 * CAPTIONS_PER_DRAWING) == 0:
            print(f"{style}: found the latents of {10 * len(latents)} drawings", flush=True)
    return Pool(torch.cat(latents), tokenize(base.tokenizer, captions, "cpu"))


def load_pool(base: Base, style: str, count: int) -> Pool:
    """The pool, kept so that a resumed run need not encode again."""
    path = OUT / f"pool-{style}.pt"
    if not path.exists():
        built = build_pool(base, style, count)
        torch.save((built.latents, built.tokens), path)
    return Pool(*torch.load(path))


class LoraTask:
    """Low-rank additions to the UNet; the text encoder has none."""

    def __init__(self, base: Base, pool: Pool, rank: int) -> None:
        torch.manual_seed(0)
        self.base, self.pool = base, pool
        targets = [*ATTENTION, *CONVOLUTIONS]
        base.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        self.parameters = {n: p for n, p in base.unet.named_parameters() if p.requires_grad}

    def loss(self, batch: int) -> Tensor:
        """The base model's own loss, on drawings in the style."""
        latents, tokens = self.pool.batch(batch)
        noisy, noise, timesteps = add_noise(self.base.scheduler, latents)
        predicted = self.base.unet(noisy, timesteps, self.base.context(tokens)).sample
        return weighted_error(predicted, noise, self.base.weights[timesteps])

    def save(self, folder: Path) -> None:
        """Writes pytorch_lora_weights.safetensors for `load_lora_weights`."""
        layers = {n: p.half() for n, p in get_peft_model_state_dict(self.base.unet).items()}
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main() -> None:
    """Trains one style, or goes on with what is left of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("style", choices=[style for style in STYLES if style != "solid"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--drawings", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    base = load_base()
    pool = load_pool(base, options.style, options.drawings)
    task = LoraTask(base, pool, options.rank)
    name = f"shapes-{options.style}"
    train(Finetuner(task, PEAK_RATE), name, options.steps, options.batch)


if __name__ == "__main__":
    main()
