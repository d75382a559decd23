"""PRECISION=fp8: what is rounded, by how much, and what sees nothing of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from sdbento.lora.hooks import WeightedAdapter, active_adapters
from sdbento.models import device
from sdbento.models.acceleration import fp8
from sdbento.models.acceleration.fp8 import Fp8Linear, convert, quantize, scaled_matmul
from sdbento.models.pipeline import Pipeline, num_bytes
from tests.support.device_errors import AcceleratorError
from tests.support.loras import cache_of, make_lora, save_peft
from tests.support.oracle import tiny_model

# A warning that torch causes itself while it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

BF16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to `b`."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def in_bf16(kind: str) -> Pipeline:
    plain = tiny_model(kind)
    pipe = copy.copy(plain.pipe)
    pipe.unet = copy.deepcopy(plain.unet).to(BF16)
    return replace(plain, pipe=pipe, dtype=BF16)


def test_a_row_is_rounded_with_a_scale_of_its_own() -> None:
    x = random(5, 64) * torch.tensor([1e-6, 1.0, 1e3, 1e6, 0.0]).to(BF16)[:, None]
    rounded, scale = quantize(x)
    assert rounded.dtype is torch.float8_e4m3fn
    assert torch.equal(rounded.float().abs().amax(dim=1)[:4], torch.full((4,), 448.0))
    error = (rounded.float() * scale - x.float()).abs()
    # three bits behind the point, and numbers below 2^-6 of the scale are not normal
    assert (error <= x.float().abs() / 16 + 2**-10 * scale).all()
    assert torch.equal(error[4], torch.zeros(64))


def test_the_product_is_that_of_the_rounded_numbers() -> None:
    x, weight, bias = random(7, 32), random(48, 32, seed=1), random(48, seed=2)
    product = scaled_matmul(quantize(x), quantize(weight), bias)
    (a, a_scale), (b, b_scale) = quantize(x), quantize(weight)
    exact = (a.double() * a_scale) @ (b.double() * b_scale).t() + bias
    assert product.dtype is BF16
    assert torch.allclose(product.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_in_fp8_stands_in_for_its_own(has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=has_bias, dtype=BF16).requires_grad_(False)
    small = Fp8Linear(layer, quantize)
    x = random(2, 9, 64)
    assert 0 < distance(small(x), layer(x)) < 0.04
    assert small(x).shape == (2, 9, 32)
    assert (small.in_features, small.out_features) == (64, 32)
    assert torch.equal(small(x.transpose(0, 1)), small(x).transpose(0, 1))


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_gpu_is_handed_what_its_matmul_takes(has_bias: bool) -> None:
    """torch checks types, shapes and the order in memory of both operands and their scales."""
    options: Any = {"dtype": BF16, "device": "cuda"}
    layer = nn.Linear(64, 32, bias=has_bias).requires_grad_(False)
    with FakeTensorMode(), torch.inference_mode():
        layer.weight = nn.Parameter(torch.empty(32, 64, **options), requires_grad=False)
        if has_bias:
            layer.bias = nn.Parameter(torch.empty(32, **options), requires_grad=False)
        small = Fp8Linear(layer, quantize)
        output = small(torch.empty(2, 9, 64, **options))
        turned = small.weight.t(), small.get_buffer("scale")
        with pytest.raises(RuntimeError):
            scaled_matmul(quantize(torch.empty(9, 64, **options)), turned)
    assert (output.shape, output.dtype, output.device.type) == ((2, 9, 32), BF16, "cuda")


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_the_linear_layers_of_transformer_blocks_are_converted_but_not_those_of_the_text(
    kind: str,
) -> None:
    unet = in_bf16(kind).unet
    before = num_bytes([unet])
    wide = {
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features % 16 == layer.out_features % 16 == 0
    }
    count = convert(unet)
    small = {name for name, layer in unet.named_modules() if isinstance(layer, Fp8Linear)}
    assert len(small) == count > 0
    assert small == {
        name
        for name in wide
        if ".transformer_blocks." in name and "attn2.to_k" not in name and "attn2.to_v" not in name
    }
    assert num_bytes([unet]) < before
    assert unet.dtype is BF16


@torch.inference_mode()
def unet_output(pipeline: Pipeline, **others: Any) -> Tensor:
    width = pipeline.unet.config.cross_attention_dim
    latents, text = random(2, 4, 8, 8), random(2, 77, width, seed=1)
    output: Tensor = pipeline.unet(latents, torch.tensor([500.0, 20.0]), text, **others)[0]
    return output


def test_a_unet_computes_nearly_the_same() -> None:
    pipeline = in_bf16("sd15")
    before = unet_output(pipeline)
    convert(pipeline.unet)
    assert 0 < distance(unet_output(pipeline), before) < 0.05


def test_loras_add_the_same_to_a_layer_in_fp8(tmp_path: Path) -> None:
    save_peft("sd15", make_lora("sd15"), tmp_path / "a.safetensors")
    differences = []
    for is_fp8 in (False, True):
        pipeline = in_bf16("sd15")
        if is_fp8:
            convert(pipeline.unet)
        adapter = WeightedAdapter(cache_of(tmp_path).get(pipeline, "a"), 1.0, 1.0)
        plain = unet_output(pipeline)
        with active_adapters(pipeline.unet, "unet", [[adapter], []]):
            changed = unet_output(pipeline)
        assert torch.equal(changed[1], plain[1])
        differences.append(changed[0] - plain[0])
    bf16, small = differences
    assert bf16.abs().max() > 0.1
    assert distance(small, bf16) < 0.2


# The rounding in one kernel. Tracing and guards are the compiler's own; no code is generated.


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    fp8._compiled.cache_clear()
    device.say_once.cache_clear()
    yield
    torch.compiler.reset()


@torch.inference_mode()
def test_the_rounding_is_compiled_once_a_width_for_any_number_of_rows() -> None:
    quantizer = fp8._fused([32, 64, 48], "cpu", "eager")
    before = Counter(counters["frames"])
    for rows, width in ((2, 32), (3, 32), (1000, 64), (7, 48)):
        x = random(rows, width)
        for ours, theirs in zip(quantizer(x), quantize(x), strict=True):
            assert torch.equal(ours.float(), theirs.float())
    assert Counter(counters["frames"]) == before
    quantizer(random(5, 16))  # which was not announced
    assert Counter(counters["frames"]) != before


def test_without_a_compiler_the_rounding_is_done_in_parts(caplog: Any) -> None:
    def backend(*_: object) -> Any:
        raise RuntimeError("Cannot find a working triton installation")

    caplog.set_level("INFO")
    assert fp8._fused([32], "cpu", backend) is quantize
    assert "Cannot find a working triton installation" in caplog.text


def test_a_gpu_that_fails_meanwhile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> Any:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fp8, "_compiled", lambda backend: fail)
    with pytest.raises(AcceleratorError):
        fp8._fused([32], "cpu")
