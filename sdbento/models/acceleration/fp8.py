"""Linear layers in fp8, half the bytes and twice the speed of bf16: what PRECISION=fp8 changes.

Weights and activations are rounded to e4m3 (Micikevicius et al. 2022), each row divided by a scale
of its own so that its largest value is just representable; the product is scaled back to bf16:

    y = (x / s_x) (w / s_w)^T * s_x s_w + b

Only linear layers of transformer blocks are converted, where SDXL spends most of its time. torch
has no convolution in fp8. On a CPU the product is a stand-in that rounds the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sdbento.errors import is_sick
from sdbento.models.device import say_once

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST = 1e-12  # a scale, also of a row of zeros
BLOCKS = "transformer_blocks"
OF_THE_TEXT = ("attn2.to_k", "attn2.to_v")  # 77 tokens: nothing to gain
MULTIPLE = 16  # of the widths that the GPU multiplies in fp8

Quantized = tuple[Tensor, Tensor]  # fp8 [rows, width], and the scales in float32 [rows, 1]
Quantizer = Callable[[Tensor], Quantized]


def quantize(x: Tensor) -> Quantized:
    """`x` [rows, width] divided by a scale a row, rounded to fp8."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=LEAST)
    return (x.float() * (1 / scale)).to(FP8), scale


def scaled_matmul(x: Quantized, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """[rows, out] in bf16, of x [rows, in] and weight [out, in]."""
    (a, a_scale), (b, b_scale) = x, weight
    if a.is_cuda:
        return torch._scaled_mm(
            a, b.t(), a_scale, b_scale.t(), bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    output = (a.float() * a_scale) @ (b.float() * b_scale).t()
    return (output if bias is None else output + bias).bfloat16()


class Fp8Linear(nn.Linear):
    """In place of a linear layer in bf16; takes and returns bf16. Hooks see it as that layer."""

    def __init__(self, layer: nn.Linear, quantizer: Quantizer) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, scale = quantize(layer.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        self._quantizer = quantizer

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features).contiguous()
        weight = self.weight, self.get_buffer("scale")
        output = scaled_matmul(self._quantizer(rows), weight, self.bias)
        return output.view(*input.shape[:-1], self.out_features)


def convert(unet: nn.Module) -> int:
    """Put the linear layers of the transformer blocks, in bf16, into fp8; returns how many.

    On a GPU this also compiles, in some seconds. Raises what a GPU that has failed reports.
    """
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear)
        and BLOCKS in name
        and not name.endswith(OF_THE_TEXT)
        and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    }
    widths = {layer.in_features for layer in layers.values()}
    on_gpu = next(unet.parameters()).is_cuda
    quantizer = _fused(sorted(widths)) if on_gpu else quantize
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, Fp8Linear(layer, quantizer))
    return len(layers)


@torch.inference_mode()
def _fused(widths: Iterable[int], device: str = "cuda", backend: Any = "inductor") -> Quantizer:
    """`quantize` in one kernel instead of five, which take longer than fp8 saves.

    It is compiled now for any number of rows of these widths, so that no request waits for it.
    """
    try:
        quantizer = _compiled(backend)
        for width in widths:
            rows = torch.ones(2 * MULTIPLE, width, dtype=torch.bfloat16, device=device)
            torch._dynamo.mark_dynamic(rows, 0)
            quantizer(rows)
    except Exception as error:  # without Triton or a compiler, say
        if is_sick(error):
            raise
        say_once(f"rounding to fp8 cannot be compiled here, which makes it slower: {error}")
        return quantize
    return quantizer


@cache
def _compiled(backend: Any) -> Quantizer:
    quantizer: Quantizer = torch.compile(quantize, dynamic=False, backend=backend)
    return quantizer
