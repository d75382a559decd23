"""Trains a ControlNet (Zhang et al. 2023) for `shapes` that follows canny edges.

Half of the captions name no shape, so that the edges decide what is drawn and where; the colours
come from the caption alone.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel
from numpy.typing import NDArray
from torch import Tensor

from draw import Rng, Scene, caption_of, paint, sample_scene, unconditional_caption
from export import PACKAGED
from finetune import OUT, Base, Finetuner, load_base, train
from train_unet import (
    CAPTIONS_PER_DRAWING,
    UNCAPTIONED,
    Drawing,
    add_noise,
    encode,
    tokenize,
    weighted_error,
)
from training.saving import ORIGIN, forget

NAME = "shapes-canny"
EMBEDDING_CHANNELS = (8, 16, 32, 48)
"""SD 1.5 has (16, 32, 96, 256), which alone would be larger than the rest."""
PEAK_RATE = 1.5e-3
THRESHOLDS = (100, 200)
SHAPELESS = 0.5
VAGUE_NOUNS = ("shape", "thing", "object", "")

Edges = NDArray[np.uint8]


def edges_of(image: Drawing) -> Edges:
    """White edges on black, (128, 128), of an image in [0, 255]."""
    return np.asarray(cv2.Canny(image.astype(np.uint8), *THRESHOLDS), dtype=np.uint8)


def without_shape(caption: str, scene: Scene, rng: Rng) -> str:
    """The caption with a vague noun, or none, in place of the shape."""
    noun = VAGUE_NOUNS[int(rng.integers(len(VAGUE_NOUNS)))]
    return " ".join(caption.replace(scene.shape, noun).split())


def _caption(scene: Scene, rng: Rng, named: bool) -> str:
    if rng.random() < UNCAPTIONED:
        return unconditional_caption(rng)
    caption = caption_of(scene, rng, named)
    return without_shape(caption, scene, rng) if rng.random() < SHAPELESS else caption


class Pool:
    """Latents (n, 4, 16, 16), tokens (n, k, 77) and edges (n, 128, 128) of drawings."""

    def __init__(self, latents: Tensor, tokens: Tensor, edges: Tensor) -> None:
        self.latents, self.tokens, self.edges = latents, tokens, edges

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random drawings, each with one of its captions; edges as (n, 3, 128, 128) in [0, 1]."""
        rows = torch.randint(len(self.latents), (size,))
        columns = torch.randint(self.tokens.shape[1], (size,))
        edges = self.edges[rows, None].expand(-1, 3, -1, -1).float() / 255
        return self.latents[rows], self.tokens[rows, columns], edges


def build_pool(base: Base, count: int) -> Pool:
    """Draws, encodes and tokenises everything the training will see."""
    vae = AutoencoderKL.from_pretrained(PACKAGED / "vae", dtype=torch.float32).eval()
    rng = np.random.default_rng(4)
    latents: list[Tensor] = []
    captions: list[str] = []
    edges: list[Edges] = []
    for _ in range(0, count, 50):
        named = [bool(rng.random() < 0.7) for _ in range(50)]
        scenes = [sample_scene(rng, background_named) for background_named in named]
        images = [paint(scene) for scene in scenes]
        latents.append(encode(vae, images, "cpu"))
        edges += [edges_of(image) for image in images]
        for scene, background_named in zip(scenes, named, strict=True):
            captions += [
                _caption(scene, rng, background_named) for _ in range(CAPTIONS_PER_DRAWING)
            ]
    tokens = tokenize(base.tokenizer, captions, "cpu")
    return Pool(torch.cat(latents), tokens, torch.from_numpy(np.stack(edges)))


def load_pool(base: Base, count: int) -> Pool:
    """The pool, kept so that a resumed run need not encode again."""
    path = OUT / "pool-canny.pt"
    if not path.exists():
        built = build_pool(base, count)
        torch.save((built.latents, built.tokens, built.edges), path)
    return Pool(*torch.load(path))


class ControlNetTask:
    """A copy of the UNet's first half, whose outputs are added to the UNet's skips."""

    def __init__(self, base: Base, pool: Pool) -> None:
        torch.manual_seed(0)
        self.base, self.pool = base, pool
        self.controlnet = ControlNetModel.from_unet(
            base.unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS
        )
        self.controlnet.requires_grad_(True)
        self.parameters = dict(self.controlnet.named_parameters())

    def loss(self, batch: int) -> Tensor:
        """The base model's own loss, with the edges of each drawing."""
        latents, tokens, edges = self.pool.batch(batch)
        noisy, noise, timesteps = add_noise(self.base.scheduler, latents)
        context = self.base.context(tokens)
        residuals, middle = self.controlnet(
            noisy, timesteps, context, controlnet_cond=edges, return_dict=False
        )
        predicted = self.base.unet(
            noisy,
            timesteps,
            context,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=middle,
        ).sample
        return weighted_error(predicted, noise, self.base.weights[timesteps])

    def save(self, folder: Path) -> None:
        """Writes config.json and the weights."""
        halved = ControlNetModel.from_config(self.controlnet.config)
        halved.load_state_dict(self.controlnet.state_dict())
        halved.half().save_pretrained(folder)
        forget(folder, ORIGIN)


def main() -> None:
    """Trains, or goes on with what is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--drawings", type=int, default=4000)
    options = parser.parse_args()
    base = load_base()
    task = ControlNetTask(base, load_pool(base, options.drawings))
    train(Finetuner(task, PEAK_RATE), NAME, options.steps, options.batch)


if __name__ == "__main__":
    main()
