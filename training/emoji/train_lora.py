"""Trains a LoRA (Hu et al. 2021) that draws in another style: `train_lora pixel-art`.

Captions are the ordinary ones: the weight of the LoRA alone decides how much of the style appears.
It is trained for the model in out/pipeline. A run that was cut off goes on from out/lora-STYLE.pt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from training.emoji.budget import Budget, Training, arguments, save
from training.emoji.effects import STYLES
from training.emoji.pool import ENCODED, Pool, composed, encode, load_pool, load_scenes
from training.emoji.train_unet import Objective

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2"]
TARGETS += ["conv_in", "conv1", "conv2", "conv", "conv_out"]
PEAK_RATE, DECAY = 2e-3, 0.99


def load_base(out: Path, device: str) -> StableDiffusionPipeline:
    """The model in out/pipeline without its autoencoder, in float32 and frozen."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        out / "pipeline", dtype=torch.float32, vae=None
    ).to(device)
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    return pipeline


def styled(out: Path, style: str, count: int) -> Iterator[Tensor]:
    """The first scenes in a style, in parts."""
    layout, _ = load_scenes(out, count)
    grounds = layout.backgrounds.split(ENCODED)
    for images, ground in zip(composed(out, layout, "cpu"), grounds, strict=True):
        yield STYLES[style](images, ground)


def styled_pool(out: Path, style: str, count: int, device: str) -> Pool:
    """Scenes in a style, with the captions they have without it; kept for a resumed run."""
    path = out / f"latents-{style}.pt"
    if not path.exists():
        save(path, encode(out, (part.to(device) for part in styled(out, style, count)), device))
    latents = torch.load(path, map_location=device)
    plain = load_pool(out, device)
    return Pool(latents, plain.tokens[: len(latents)], plain.empty)


def write(unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes pytorch_lora_weights.safetensors for `load_lora_weights`, in float16."""
    layers = {name: value.half().cpu() for name, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main() -> None:
    parser = arguments(__doc__, minutes=10.0, batch=32)
    parser.add_argument("style", choices=STYLES)
    parser.add_argument("--scenes", type=int, default=16384)
    options = parser.parse_args()
    out, device = options.out, options.device
    pool = styled_pool(out, options.style, options.scenes, device)
    base = load_base(out, device)
    torch.manual_seed(4)
    base.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    training = Training(base.unet, PEAK_RATE, out / f"lora-{options.style}.pt", DECAY)
    objective = Objective(base.unet, base.text_encoder, pool, device)
    budget = Budget(options.minutes * 60)
    training.run(lambda: objective(options.batch), options.batch, budget)
    training.use_averages()
    write(base.unet, out / f"emoji-{options.style}")


if __name__ == "__main__":
    main()
