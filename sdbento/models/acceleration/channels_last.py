"""The blocks of UNets and VAEs around their convolutions, in channels-last order throughout.

The same computations as diffusers' own, which turns activations around at each group norm and
behind each transformer. What stands between convolutions is computed by `kernels`, on a GPU those
of `triton_kernels.py`: group norms with SiLU, and sums with the biases that the convolutions leave
out. A layer that has a hook, of a LoRA, is called as it is.
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


class Kernels(Protocol):
    """What they return is in channels-last order."""

    def group_norm(
        self, x: Tensor, norm: nn.GroupNorm, *, silu: bool = False, shift: Tensor | None = None
    ) -> Tensor:
        """`norm` of x [N, C, h, w], or of x + shift [N, C]; then SiLU, if wanted."""

    def add(self, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        """a + b + bias, of a and b [N, C, h, w] and a bias [C]."""


@torch.inference_mode()
def install(network: Any) -> None:
    """Have `network`, on a GPU in channels-last order, compute so from now on, if Triton works."""
    if network.device.type != "cuda":
        return
    if importlib.util.find_spec("triton") is None:
        say_once("Triton is not installed: SDBENTO_COMPILE does less than it could")
        return
    from sdbento.models.acceleration import triton_kernels

    x = torch.zeros(1, 32, 8, 8, device=network.device, dtype=network.dtype)
    try:
        triton_kernels.group_norm(x, nn.GroupNorm(32, 32, device=x.device, dtype=x.dtype))
    except Exception as error:  # without a C compiler, say
        if is_sick(error):
            raise
        say_once(f"Triton does not work here, so SDBENTO_COMPILE does less than it could: {error}")
        return
    for module, forward in forwards(network, triton_kernels).items():
        module.forward = forward


def forwards(network: nn.Module, kernels: Kernels) -> dict[Any, Forward]:
    """What to call in place of the `forward` of these modules of `network`."""
    found: dict[Any, Forward] = {}
    for name, module in network.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D" and _is_plain(module):
            found[module] = partial(_resnet, module, kernels)
        elif kind == "Transformer2DModel":
            found[module] = partial(_transformer, module, kernels)
        elif name.endswith("conv_norm_out") and isinstance(module, nn.GroupNorm):
            found[module] = partial(_norm, module, kernels)
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


def _norm(module: nn.GroupNorm, kernels: Kernels, x: Tensor) -> Tensor:
    return kernels.group_norm(x, module)


def _resnet(block: Any, kernels: Kernels, x: Tensor, temb: Tensor | None) -> Tensor:
    """x [N, C, h, w]; temb [N, ...] of the timesteps, of which VAEs have none."""
    hidden, bias = _convolved(block.conv1, kernels.group_norm(x, block.norm1, silu=True))
    shift = bias.expand(len(x), -1)
    if temb is not None:
        shift = shift + block.time_emb_proj(F.silu(temb))
    hidden = kernels.group_norm(hidden, block.norm2, silu=True, shift=shift.contiguous())
    hidden, bias = _convolved(block.conv2, hidden)
    if block.conv_shortcut is not None:
        x, of_shortcut = _convolved(block.conv_shortcut, x)
        bias = bias + of_shortcut
    return kernels.add(x, hidden, bias)


def _convolved(conv: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer computes, and the bias [C] that is still to be added to that."""
    if conv._forward_hooks or conv._forward_pre_hooks:
        return conv(x), torch.zeros_like(conv.bias)
    options = conv.stride, conv.padding, conv.dilation, conv.groups
    return F.conv2d(x, conv.weight, None, *options), conv.bias


def _transformer(
    block: Any, kernels: Kernels, x: Tensor, encoder_hidden_states: Tensor, **_: Any
) -> tuple[Tensor]:
    """x [N, C, h, w]; every pixel is a token."""
    hidden = kernels.group_norm(x, block.norm)
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
