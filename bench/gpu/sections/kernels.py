"""The server's own kernels: are they right, and how long do they take beside torch's?

On a CPU it is only compiled for an H100, where Triton is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu.bench import Bench
from bench.gpu.rows import Label
from bench.gpu.timing import median_seconds

ROWS = 16  # of a UNet call: eight guided images
# Channels, side, rows: SDXL's UNet, a skip connection, and the VAE's last level at two sizes.
SHAPES = ((320, 128, ROWS), (960, 64, ROWS), (1280, 32, ROWS), (128, 1024, 1), (128, 2048, 1))
GROUPS = 32


def measure(bench: Bench) -> None:
    if importlib.util.find_spec("triton") is None:
        bench.note("Triton is not installed")
        return
    for channels, side, rows in SHAPES:
        with bench.part(what="group norm with SiLU", shape=f"{channels} at {side}"):
            if bench.on_gpu:
                group_norms(bench, channels, 64 if bench.toy else side, rows)
            else:
                compiled(bench, channels, side)
        if bench.on_gpu:
            with bench.part(what="sum with a bias", shape=f"{channels} at {side}"):
                sums(bench, channels, 64 if bench.toy else side, rows)


def group_norms(bench: Bench, channels: int, side: int, rows: int) -> None:
    """Against torch in float64, of numbers whose mean is not zero."""
    from sdbento.models.acceleration.triton_kernels import group_norm

    norm = nn.GroupNorm(GROUPS, channels, device=bench.device, dtype=bench.dtype)
    x = 2 * torch.randn(rows, channels, side, side, device=bench.device, dtype=bench.dtype) + 1
    shift = torch.randn(rows, channels, device=bench.device, dtype=bench.dtype)
    turned = x.contiguous(memory_format=torch.channels_last)

    def stock() -> Tensor:
        y = F.silu(norm(x + shift[:, :, None, None]))
        return y.contiguous(memory_format=torch.channels_last)

    def ours() -> Tensor:
        return group_norm(turned, norm, silu=True, shift=shift)

    reference = F.silu(F.group_norm(x[:1].double() + shift[:1, :, None, None], GROUPS))
    figures = compared(bench, reference, ours, stock)
    bench.row(figures, what="group norm with SiLU", shape=f"{channels} at {side}")


def sums(bench: Bench, channels: int, side: int, rows: int) -> None:
    """As at the end of a block: its input, what its last convolution gave, and that one's bias."""
    from sdbento.models.acceleration.triton_kernels import add

    shape = rows, channels, side, side
    a, b = (
        torch.randn(shape, device=bench.device, dtype=bench.dtype).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    bias = torch.randn(channels, device=bench.device, dtype=bench.dtype)
    reference = a[:1].double() + b[:1].double() + bias.double()[:, None, None]
    figures = compared(
        bench, reference, lambda: add(a, b, bias), lambda: a + (b + bias[:, None, None])
    )
    bench.row(figures, what="sum with a bias", shape=f"{channels} at {side}")


def compared(
    bench: Bench, reference: Tensor, ours: Callable[[], Tensor], stock: Callable[[], Tensor]
) -> dict[str, Label]:
    """`reference`: the first row of the result."""
    figures: dict[str, Label] = {}
    for name, call in (("our", ours), ("torch", stock)):
        figures[f"{name}_error"] = float((call()[:1] - reference).abs().max())
        figures[f"{name}_ms"] = 1000 * median_seconds(call, bench.device, bench.repeats)
    return figures


def compiled(bench: Bench, channels: int, side: int) -> None:
    """For compute capability 9.0; raises what Triton's compiler says."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sdbento.models.acceleration import triton_kernels as kernels

    wide = min(kernels.WIDEST, channels & -channels)
    in_group = channels // GROUPS
    tile = {"channels": channels, "wide": wide, "high": kernels.TILE // wide}
    of_group: dict[str, Any] = {"channels": channels, "in_group": in_group, "shifted": True}
    of_group |= {"padded": 2 ** (in_group - 1).bit_length(), "at_once": 32}
    pointers = dict.fromkeys(("a", "b", "x", "y", "weight", "bias", "shift"), "*bf16")
    pointers |= dict.fromkeys(("sums", "factors"), "*fp32")
    cases: Mapping[Any, dict[str, Any]] = {
        kernels._sum_up: tile | {"chunk": kernels.CHUNK},
        kernels._find_factors: of_group,
        kernels._apply: tile | {"silu": True},
        kernels._add: tile,
    }
    for kernel, constants in cases.items():
        types = {"pixels": "i32", "chunks": "i32", "rows": "i32", "eps": "fp32", **pointers}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compile(source, target=GPUTarget("cuda", 90, 32))
    bench.row({"kernels": len(cases)}, what="compiled for an H100", shape=f"{channels} at {side}")
