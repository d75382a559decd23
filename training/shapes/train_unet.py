"""Trains the UNet and the text encoder of the `shapes` model on latents of captioned drawings.

Needs the autoencoder that train_vae.py leaves in out/vae, and the text encoder of train_text.py,
which goes on learning here. Every 100 steps it saves its state,
from which it resumes when started again, and a whole pipeline with averaged weights.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from draw import Rng, Scene, caption_of, paint, sample_scene, unconditional_caption
from text import HIDDEN, build_captions_tokenizer, build_text_encoder
from training.tokenizer import MAX_TOKENS, save_tokenizer

OUT = Path(__file__).parent / "out"
PEAK_RATE, WARMUP, FLAT_PART = 1.5e-3, 200, 0.5
OFFSET_NOISE = 0.1
MAX_WEIGHT = 25.0
EMA_DECAY = 0.999
CHECKPOINT_EVERY = 100
CAPTIONS_PER_DRAWING = 4
UNCAPTIONED = 0.1

Drawing = NDArray[np.float32]


@dataclass(frozen=True)
class Pool:
    """Latents (n, 4, 16, 16), scaled, and for each the tokens of several captions (n, k, 77)."""

    latents: Tensor
    tokens: Tensor

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random drawings, each with one of its captions."""
        rows = torch.randint(len(self.latents), (size,), device=self.latents.device)
        columns = torch.randint(self.tokens.shape[1], (size,), device=self.latents.device)
        return self.latents[rows], self.tokens[rows, columns]


def build_unet() -> UNet2DConditionModel:
    """SD 1.5's UNet with two levels; cross-attention at 16x16 and, in the middle, at 8x8."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=HIDDEN,
        attention_head_dim=3,  # the number of heads, under the name that SD 1.5 gives it
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of SD 1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: list[Drawing], device: str) -> Tensor:
    """Scaled latents of drawings given as (128, 128, 3) arrays in [0, 255]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device) / 127.5 - 1
    latents: Tensor = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    return latents


def _caption(scene: Scene, rng: Rng, named: bool) -> str:
    if rng.random() < UNCAPTIONED:
        return unconditional_caption(rng)
    return caption_of(scene, rng, named)


def sample_captions(rng: Rng, count: int, style: str = "solid") -> tuple[list[Drawing], list[str]]:
    """Drawings, each with its captions; three of ten stand on the unnamed default background."""
    images: list[Drawing] = []
    captions: list[str] = []
    for _ in range(count):
        named = rng.random() < 0.7
        scene = sample_scene(rng, named)
        images.append(paint(scene, style=style))
        captions += [_caption(scene, rng, named) for _ in range(CAPTIONS_PER_DRAWING)]
    return images, captions


def load_pool(tokenizer: CLIPTokenizer, count: int, device: str) -> Pool:
    """The pool, kept in out/pool.pt so that a resumed run need not encode again."""
    if not (OUT / "pool.pt").exists():
        built = build_pool(tokenizer, count, device)
        torch.save((built.latents, built.tokens), OUT / "pool.pt")
    return Pool(*torch.load(OUT / "pool.pt", map_location=device))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: str) -> Tensor:
    """Tokens of captions that come in groups, one group a drawing: (n, k, 77)."""
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS).input_ids
    return torch.tensor(tokens, device=device).view(-1, CAPTIONS_PER_DRAWING, MAX_TOKENS)


def build_pool(tokenizer: CLIPTokenizer, count: int, device: str) -> Pool:
    """Draws, encodes and tokenises everything the training will see."""
    vae = AutoencoderKL.from_pretrained(OUT / "vae").to(device).eval()
    rng = np.random.default_rng(2)
    latents: list[Tensor] = []
    captions: list[str] = []
    for _ in range(0, count, 50):
        images, texts = sample_captions(rng, 50)
        latents.append(encode(vae, images, device))
        captions += texts
    return Pool(torch.cat(latents), tokenize(tokenizer, captions, device))


def learning_rate(step: int, num_steps: int, warmup: int = WARMUP) -> float:
    """Part of the peak rate: linear warm-up, a flat part, a linear descent to one percent."""
    descent = max(0.0, step / num_steps - FLAT_PART) / (1 - FLAT_PART)
    return min(1.0, (step + 1) / warmup) * max(0.01, 1 - descent)


def loss_weights(scheduler: DDIMScheduler) -> Tensor:
    """Weight of each timestep's squared error, 1 / alpha_bar, bounded."""
    weights: Tensor = scheduler.alphas_cumprod.reciprocal().clamp(max=MAX_WEIGHT)
    return weights


def add_noise(scheduler: DDIMScheduler, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, the noise in them, and the random timestep of each.

    The offset hides the background's colour, which the mean of a noisy latent otherwise gives
    away, so that it must come from the caption.
    """
    batch, device = len(latents), latents.device
    offset = OFFSET_NOISE * torch.randn(batch, 4, 1, 1, device=device)
    noise = torch.randn_like(latents) + offset
    timesteps = torch.randint(1000, (batch,), device=device)
    return scheduler.add_noise(latents, noise, timesteps), noise, timesteps


def weighted_error(predicted: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
    """Squared error of v (Salimans and Ho 2022), from the predicted noise: error / alpha_bar.

    Plain errors of the noise hardly count at the noise levels where the caption decides the
    colours; unbounded, the last few levels would count for all others.
    """
    errors = F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
    return (errors * weights).mean()


class Trainer:
    """The two networks, their averages and the optimizer; `step` is the only counter."""

    def __init__(self, tokenizer: CLIPTokenizer, pool: Pool, device: str) -> None:
        torch.manual_seed(0)
        self.tokenizer, self.pool = tokenizer, pool
        self.networks = torch.nn.ModuleDict(
            {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
        ).to(device)
        self.networks["text_encoder"].load_state_dict(torch.load(OUT / "text_encoder.pt"))
        self.parameters = list(self.networks.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=1e-3)
        self.scheduler = build_scheduler()
        self.weights = loss_weights(self.scheduler).to(device)
        self.step = 0

    def loss(self, batch: int) -> Tensor:
        """The weighted error on random drawings and captions."""
        latents, tokens = self.pool.batch(batch)
        noisy, noise, timesteps = add_noise(self.scheduler, latents)
        context = self.networks["text_encoder"](tokens).last_hidden_state
        predicted = self.networks["unet"](noisy, timesteps, context).sample
        return weighted_error(predicted, noise, self.weights[timesteps])

    def advance(self, batch: int, rate: float) -> float:
        """One optimizer step and one step of the moving averages; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (9 + self.step))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        return loss.item()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the random state of the CPU included."""
        return {
            "step": self.step,
            "networks": self.networks.state_dict(),
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues the run that wrote `state`."""
        self.step = state["step"]
        self.networks.load_state_dict(state["networks"])
        torch._foreach_copy_(self.averages, state["averages"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])

    def save_pipeline(self, folder: Path) -> None:
        """Writes the pipeline with averaged weights; the training weights stay as they are."""
        unet, text_encoder = build_unet(), build_text_encoder(self.tokenizer)
        averaged = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
        with torch.no_grad():
            for target, average in zip(averaged.parameters(), self.averages, strict=True):
                target.copy_(average)
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(OUT / "vae"),
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
        save_tokenizer(self.tokenizer, folder / "tokenizer")


def train(trainer: Trainer, num_steps: int, batch: int) -> None:
    """Runs to `num_steps`; a checkpoint now and then and at the end."""
    started, mean_loss = time.monotonic(), 0.0
    while trainer.step < num_steps:
        loss = trainer.advance(batch, PEAK_RATE * learning_rate(trainer.step, num_steps))
        mean_loss += loss / CHECKPOINT_EVERY
        if trainer.step % CHECKPOINT_EVERY == 0:
            seconds = time.monotonic() - started
            print(f"step {trainer.step} loss {mean_loss:.4f} {seconds:.0f} s", flush=True)
            mean_loss = 0.0
        if trainer.step % CHECKPOINT_EVERY == 0 or trainer.step == num_steps:
            torch.save(trainer.state(), OUT / "unet.pt")
            trainer.save_pipeline(OUT / "pipeline")


def main() -> None:
    """Builds the pool, resumes what there is to resume, and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--drawings", type=int, default=5000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    tokenizer = build_captions_tokenizer()
    started = time.monotonic()
    pool = load_pool(tokenizer, options.drawings, options.device)
    print(f"{len(pool.latents)} drawings, latent deviation {pool.latents.std():.3f},", end=" ")
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    trainer = Trainer(tokenizer, pool, options.device)
    if (OUT / "unet.pt").exists():
        trainer.restore(torch.load(OUT / "unet.pt", map_location=options.device))
    parameters = sum(p.numel() for p in trainer.parameters)
    print(f"{parameters / 1e6:.2f} M parameters, from step {trainer.step}", flush=True)
    train(trainer, options.steps, options.batch)


if __name__ == "__main__":
    main()
