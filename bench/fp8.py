"""What PRECISION=fp8 does to images: the same prompts in fp32, bf16 and fp8, with real weights.

python -m bench.fp8 [--out PICTURES.png]

Prints how near each image comes to that of fp32, as the peak signal-to-noise ratio in dB. On a CPU
the fp8 matmul is emulated: it rounds the same way, and adds up in float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from bench.gpu.timing import true_fp32
from bench.noise import RoundedNoise
from sdbento.catalog.lookup import Catalog
from sdbento.environment import load_settings
from sdbento.models.acceleration import fp8
from sdbento.models.pipeline import Pipeline, modules
from sdbento.models.weights import load
from tests.support.oracle import Pixels, engine_pixels

PROMPTS = (
    "a large red circle on a blue background",
    "a small green square",
    "a yellow star on a black background",
    "a large purple triangle on an orange background",
    "a white ring",
    "a small blue cross on a yellow background",
    "an orange star on a green background",
    "a large black square on a white background",
)
REQUEST: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0, "scheduler": "Euler"}


def models() -> dict[str, Pipeline]:
    """`shapes` by precision, on the GPU if there is one."""
    settings = load_settings(sd_model="shapes", precision="fp32", offline=True)
    exact = load(Catalog(settings).resolve("shapes"), settings)
    assert isinstance(exact, Pipeline)
    return {"fp32": exact, "bf16": in_bf16(exact), "fp8": in_fp8(exact)}


def in_bf16(exact: Pipeline) -> Pipeline:
    pipe = copy.deepcopy(exact.pipe)
    for module in modules(pipe):
        nn.Module.to(module, torch.bfloat16)  # diffusers' own warns
    return replace(exact, pipe=pipe, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)


def in_fp8(exact: Pipeline) -> Pipeline:
    pipeline = in_bf16(exact)
    fp8.convert(pipeline.unet)
    return pipeline


def pictures(
    by_precision: Mapping[str, Pipeline], prompts: tuple[str, ...] = PROMPTS, **fields: Any
) -> dict[str, list[Pixels]]:
    """An image of every prompt, [height, width, 3] on [0, 1], by precision."""
    with true_fp32(), RoundedNoise():
        return {
            precision: [
                engine_pixels(pipeline, prompt=prompt, seed=seed, **REQUEST | fields)
                for seed, prompt in enumerate(prompts)
            ]
            for precision, pipeline in by_precision.items()
        }


def psnr(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio in dB, of images on [0, 1]; infinite where they are the same."""
    error = np.mean((image - reference) ** 2, dtype=np.float64)
    return float(-10 * np.log10(error)) if error else np.inf


def side_by_side(images: Mapping[str, list[Pixels]]) -> Image.Image:
    """A row for each precision, a column for each prompt."""
    rows = [np.concatenate(row, axis=1) for row in images.values()]
    grid: NDArray[np.uint8] = (np.concatenate(rows) * 255).round().astype(np.uint8)
    return Image.fromarray(grid)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fp8", description=__doc__)
    parser.add_argument("--out", type=Path, help="PNG with a row for each precision")
    out: Path | None = parser.parse_args().out
    by_precision = models()
    images = pictures(by_precision)
    device = by_precision["fp8"].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "emulated on a CPU"
    print(f"PSNR against fp32 in dB, shapes, 128x128, 20 steps; {name}")
    print("| prompt | bf16 | fp8 |\n| --- | --- | --- |")
    figures = [
        [psnr(images[p][i], images["fp32"][i]) for p in ("bf16", "fp8")]
        for i in range(len(PROMPTS))
    ]
    for prompt, row in zip([*PROMPTS, "mean"], [*figures, np.mean(figures, axis=0)], strict=True):
        print(f"| {prompt} | {row[0]:.1f} | {row[1]:.1f} |")
    if out is not None:
        side_by_side(images).save(out, optimize=True)


if __name__ == "__main__":
    main()
