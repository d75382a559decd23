"""The networks of `emoji`, all in the architecture of Stable Diffusion 1.5.

`FULL` is the model; `TOY` has the same parts, so small that a test trains them in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.emoji.icons import SIDE
from training.tokenizer import MAX_TOKENS


@dataclass(frozen=True)
class Scale:
    """How large the networks are, and how much they see."""

    unet_channels: tuple[int, ...]
    vae_channels: tuple[int, ...]
    text_width: int
    text_layers: int
    merges: int
    classifier_channels: int
    vae_batch: int
    text_batch: int
    unet_batch: int
    classifier_batch: int
    scenes: int
    """Captioned pictures whose latents are kept; they are seen again and again."""


FULL = Scale((64, 128, 256), (16, 32, 64, 128), 256, 4, 4500, 48, 64, 1024, 512, 256, 2**17)
TOY = Scale((16, 16, 32), (8, 8, 8, 8), 64, 1, 300, 8, 4, 8, 8, 8, 64)


def build_vae(scale: Scale) -> AutoencoderKL:
    """Factor 8, four latent channels, no attention in the middle."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=scale.vae_channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def build_unet(scale: Scale) -> UNet2DConditionModel:
    """Three levels; cross-attention at 8x8 and 4x4, which is where names become things."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=scale.unet_channels,
        layers_per_block=1,
        cross_attention_dim=scale.text_width,
        attention_head_dim=4,  # the number of heads, under the name that SD 1.5 gives it
        norm_num_groups=16,
    )


def build_text_encoder(scale: Scale, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=scale.text_width,
            intermediate_size=4 * scale.text_width,
            num_hidden_layers=scale.text_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule, made to end in pure noise (Lin et al. 2023), and v-prediction.

    Without that the last step still shows the background's colour, and the model would read it
    there instead of in the caption.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Tokens, (n, MAX_TOKENS)."""
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return torch.tensor(ids.input_ids, dtype=torch.int16)


class Classifier(nn.Module):
    """Names the icon in a picture, (n, 3, SIDE, SIDE) in [-1, 1]: logits (n, names).

    Half the size is enough for that.
    """

    def __init__(self, names: int, channels: int) -> None:
        super().__init__()
        widths = [channels * factor for factor in (1, 2, 4, 8)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 5, 2, 2)]
        for before, after in zip([channels, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], names)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.features(F.avg_pool2d(pictures, 2))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
