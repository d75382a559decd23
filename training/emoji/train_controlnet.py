"""Trains a ControlNet (Zhang et al. 2023) for `emoji` that follows canny edges.

It is trained for the model in out/pipeline. It has no cross-attention: edges need no words, and
without it half the weights suffice. A run that was cut off goes on from out/canny.pt.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from training.emoji.budget import Budget, Training, arguments, save
from training.emoji.edges import edges_of
from training.emoji.pool import composed, load_pool, load_scenes
from training.emoji.train_lora import load_base
from training.emoji.train_unet import Objective
from training.saving import ORIGIN, forget

EMBEDDING_CHANNELS, GAIN = (16, 24, 32, 64), 1.7
UNSAID, SKEW = 0.5, 0.5
"""Half of the captions say nothing, and there is much noise, so that edges are worth following."""
PEAK_RATE, MATRIX_RATE, DECAY = 8e-4, 3e-3, 0.995


def build(unet: UNet2DConditionModel) -> ControlNetModel:
    """The UNet's first half without its attention, with the UNet's weights.

    Its outputs begin at zero, as in diffusers, so that nothing is disturbed.
    """
    levels = len(unet.config.block_out_channels)
    network = ControlNetModel(
        down_block_types=("DownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2D",
        block_out_channels=unet.config.block_out_channels,
        layers_per_block=unet.config.layers_per_block,
        cross_attention_dim=unet.config.cross_attention_dim,
        attention_head_dim=unet.config.attention_head_dim,
        norm_num_groups=unet.config.norm_num_groups,
        conditioning_embedding_out_channels=EMBEDDING_CHANNELS,
    )
    own = network.state_dict()
    weights = {name: value for name, value in unet.state_dict().items() if name in own}
    network.load_state_dict(weights, strict=False)
    let_through(network.controlnet_cond_embedding)
    return network


def let_through(embedding: nn.Module) -> None:
    """Weights with which edges are as strong behind the embedding as features of latents are.

    With those of PyTorch they are 100,000 times weaker, and in diffusers the last layer is zero.
    """
    for layer in embedding.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.normal_(layer.weight, std=GAIN / math.sqrt(layer.weight[0].numel()))
            nn.init.zeros_(layer.bias)


def load_edges(out: Path, count: int) -> Tensor:
    """Edges of the first scenes, (n, 1, side, side) bytes; kept for a resumed run."""
    path = out / "edges.pt"
    if not path.exists():
        layout, _ = load_scenes(out, count)
        save(path, torch.cat([edges_of(images) for images in composed(out, layout, "cpu")]))
    edges: Tensor = torch.load(path)
    return edges


class Controlled:
    """The loss of the UNet, which stays as it is, with a ControlNet that sees the edges."""

    def __init__(self, controlnet: ControlNetModel, objective: Objective, edges: Tensor) -> None:
        self.controlnet, self.objective, self.edges = controlnet, objective, edges

    def __call__(self, batch: int) -> Tensor:
        pool = self.objective.pool
        rows = torch.randint(len(self.edges), (batch,), device=self.edges.device)
        edges = self.edges[rows].expand(-1, 3, -1, -1).float() / 255

        def predict(noisy: Tensor, timesteps: Tensor, context: Tensor) -> UNet2DConditionOutput:
            skips, middle = self.controlnet(
                noisy, timesteps, context, controlnet_cond=edges, return_dict=False
            )
            return self.objective.unet(
                noisy,
                timesteps,
                context,
                down_block_additional_residuals=skips,
                mid_block_additional_residual=middle,
            )

        return self.objective.error(predict, *pool.at(rows, UNSAID), SKEW)


def main() -> None:
    parser = arguments(__doc__, minutes=20.0, batch=32)
    parser.add_argument("--scenes", type=int, default=32768)
    options = parser.parse_args()
    out, device = options.out, options.device
    base = load_base(out, device)
    torch.manual_seed(5)
    controlnet = build(base.unet).to(device, memory_format=torch.channels_last)
    objective = Objective(base.unet, base.text_encoder, load_pool(out, device), device)
    loss = Controlled(controlnet, objective, load_edges(out, options.scenes).to(device))
    training = Training(controlnet, PEAK_RATE, out / "canny.pt", DECAY, MATRIX_RATE)
    training.run(lambda: loss(options.batch), options.batch, Budget(options.minutes * 60))
    training.use_averages()
    controlnet.half().save_pretrained(out / "emoji-canny")
    forget(out / "emoji-canny", ORIGIN)


if __name__ == "__main__":
    main()
