"""The blocks of UNets and VAEs around their convolutions, in channels-last order throughout.

The same computations as diffusers' own, which turns activations around at each group norm and
behind each transformer. All layers but group norms are still called as modules, so hooks of LoRAs
find their places. Group norms are computed by Triton kernels (`group_norm.py`), which can add a
shift to their input, and apply SiLU to what comes out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdbento.errors import is_sick
from sdbento.models.device import say_once

Forward = Callable[..., Any]


class Norm(Protocol):
    def __call__(
        self, x: Tensor, norm: nn.GroupNorm, *, silu: bool = False, shift: Tensor | None = None
    ) -> Tensor:
        """`norm` of x [N, C, h, w] (+ shift [N, C]), in channels-last order."""


@torch.inference_mode()
def install(network: Any) -> None:
    """Have `network`, on a GPU in channels-last order, compute so from now on, if Triton works."""
    if network.device.type != "cuda":
        return
    if importlib.util.find_spec("triton") is None:
        say_once("Triton is not installed: SDBENTO_COMPILE does less than it could")
        return
    from sdbento.models.acceleration.group_norm import group_norm

    x = torch.zeros(1, 32, 8, 8, device=network.device, dtype=network.dtype)
    try:
        group_norm(x, nn.GroupNorm(32, 32, device=x.device, dtype=x.dtype))
    except Exception as error:  # without a C compiler, say
        if is_sick(error):
            raise
        say_once(f"Triton does not work here, so SDBENTO_COMPILE does less than it could: {error}")
        return
    for module, forward in forwards(network, group_norm).items():
        module.forward = forward


def forwards(network: nn.Module, norm: Norm) -> dict[Any, Forward]:
    """What to call in place of the `forward` of these modules of `network`."""
    found: dict[Any, Forward] = {}
    for name, module in network.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D" and _is_plain(module):
            found[module] = partial(_resnet, module, norm)
        elif kind == "Transformer2DModel":
            found[module] = partial(_transformer, module, norm)
        elif name.endswith("conv_norm_out") and isinstance(module, nn.GroupNorm):
            found[module] = partial(_norm, module, norm)
    return found


def _is_plain(block: Any) -> bool:
    """As all of SD 1.5, 2.1 and XL are; decoders of VAEs say "group" and have no timesteps."""
    resizes = block.upsample is not None or block.downsample is not None
    return (
        (block.time_embedding_norm == "default" or block.time_emb_proj is None)
        and isinstance(block.nonlinearity, nn.SiLU)
        and not (block.skip_time_act or resizes)
        and block.output_scale_factor == 1.0
    )


def _norm(module: nn.GroupNorm, norm: Norm, x: Tensor) -> Tensor:
    return norm(x, module)


def _resnet(block: Any, norm: Norm, x: Tensor, temb: Tensor | None) -> Tensor:
    """x [N, C, h, w]; temb [N, ...] of the timesteps, of which VAEs have none."""
    hidden = block.conv1(norm(x, block.norm1, silu=True))
    shift = None if temb is None else block.time_emb_proj(F.silu(temb))
    hidden = block.conv2(norm(hidden, block.norm2, silu=True, shift=shift))
    residual = x if block.conv_shortcut is None else block.conv_shortcut(x)
    output: Tensor = residual + hidden
    return output


def _transformer(
    block: Any, norm: Norm, x: Tensor, encoder_hidden_states: Tensor, **_: Any
) -> tuple[Tensor]:
    """x [N, C, h, w]; every pixel is a token."""
    hidden = norm(x, block.norm)
    if not block.use_linear_projection:
        hidden = block.proj_in(hidden)
    tokens = hidden.permute(0, 2, 3, 1).flatten(1, 2)
    if block.use_linear_projection:
        tokens = block.proj_in(tokens)
    for one in block.transformer_blocks:
        tokens = one(tokens, encoder_hidden_states=encoder_hidden_states)
    if block.use_linear_projection:
        tokens = block.proj_out(tokens)
    hidden = tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    if not block.use_linear_projection:
        hidden = block.proj_out(hidden)
    return (x + hidden,)
