"""Less work for a picture: what DeepCache, token merging and a guidance interval save and cost.

python -m bench.less_work

Draws 16 prompts with `shapes`, first as usual and then with each option, and compares the pictures
(PSNR). The UNet's seconds come from its calls, of which each kind is timed in turn with the others.
For full-size models it counts operations, on tensors without data. Writes the tables into
docs/performance.md and the pictures into docs/images.
"""

from __future__ import annotations

import asyncio
import json
import math
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

from bench.fp8 import psnr
from bench.hardware import hardware
from bench.trace import COLOURS, SHAPES
from sdbento.app import App
from sdbento.engine.inputs import within
from sdbento.engine.trajectory import BatchKey, Calls, Pass
from sdbento.environment import load_settings
from sdbento.request.schema import GenerateRequest
from sdbento.runner.unet.deep_cache import kept_features, shallow
from sdbento.runner.unet.token_merging import merged_tokens
from tools.marked import replaced

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "bench" / "configs"
MODEL = ROOT / "sdbento" / "bundled" / "shapes"
REPORT = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "images" / "less-work.png"
ROUNDS = 15
SIDE = 128  # of the pictures
NUM_PROMPTS = 16
SHOWN = 6  # of the prompts
FIELDS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0, "scheduler": "DDIM"}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "deep_cache_interval 2": {"deep_cache_interval": 2},
    "deep_cache_interval 3": {"deep_cache_interval": 3},
    "deep_cache_interval 5": {"deep_cache_interval": 5},
    "token_merging_ratio 0.25": {"token_merging_ratio": 0.25},
    "token_merging_ratio 0.5": {"token_merging_ratio": 0.5},
    "guidance 0.2 to 0.8": {"guidance_start": 0.2, "guidance_end": 0.8},
    "deep_cache_interval 3, guidance 0.2 to 0.8": {
        "deep_cache_interval": 3,
        "guidance_start": 0.2,
        "guidance_end": 0.8,
    },
}
Pixels = NDArray[np.uint8]


def draw_all() -> dict[str, list[Pixels]]:
    """The pictures of every option."""
    app = App(load_settings(sd_model="shapes", max_batch_size=NUM_PROMPTS))
    app.start()

    async def run(option: dict[str, Any]) -> list[Pixels]:
        results = await asyncio.gather(*(app.run(request) for request in make_requests(option)))
        return [np.asarray(result.images[0]) for result in results]

    try:
        with asyncio.Runner() as runner:
            return {name: runner.run(run(option)) for name, option in OPTIONS.items()}
    finally:
        app.close()


def make_requests(option: dict[str, Any]) -> list[GenerateRequest]:
    """Every shape and every colour at least twice."""
    requests = []
    for i in range(NUM_PROMPTS):
        colour, background = COLOURS[i % 6], COLOURS[(i + 1 + i // 6) % 6]
        prompt = f"a large {colour} {SHAPES[(i + i // 6) % 6]} on a {background} background"
        requests.append(GenerateRequest(prompt=prompt, seed=i, **FIELDS, **option))
    return requests


def calls_of(option: dict[str, Any]) -> Sequence[Calls]:
    """The UNet calls of one image."""
    steps, side, nothing = FIELDS["num_inference_steps"], SIDE // 8, cast(Any, None)
    start, end = option.get("guidance_start", 0.0), option.get("guidance_end", 1.0)
    guided = [step for step in range(steps) if within(step, steps, start, end)]
    key = BatchKey("shapes", side, side, token_merging_ratio=option.get("token_merging_ratio", 0.0))
    one = Pass(
        key,
        steps,
        range(guided[0], guided[-1] + 1),
        inputs=nothing,
        pipeline=nothing,
        deep_cache_interval=option.get("deep_cache_interval", 1),
    )
    return one.remaining_calls(0)


@torch.inference_mode()
def measure_calls(unet: Any, num_images: int) -> dict[str, float]:
    """Seconds of the UNet for so many images with each option, from the best time of each call."""
    kinds = {(key, rows) for option in OPTIONS.values() for key, rows, _ in calls_of(option)}
    seconds = dict.fromkeys(kinds, math.inf)
    for _ in range(ROUNDS):
        for key, rows in kinds:
            seconds[key, rows] = min(seconds[key, rows], _seconds(unet, key, num_images * rows))
    return {
        name: sum(count * seconds[key, rows] for key, rows, count in calls_of(option))
        for name, option in OPTIONS.items()
    }


def _seconds(unet: Any, key: BatchKey, rows: int) -> float:
    """Of one call on random rows."""
    size = key.latent_height, key.latent_width
    text = torch.randn(rows, 77, unet.config.cross_attention_dim)
    inputs = torch.randn(rows, 4, *size), torch.full((rows,), 500.0), text
    features = torch.randn(rows, unet.config.block_out_channels[1], *size)
    started = time.perf_counter()
    with merged_tokens(unet, key.token_merging_ratio, *size):
        (shallow(unet, features) if key.shallow else unet)(*inputs)
    return time.perf_counter() - started


def _floats(picture: Pixels) -> NDArray[np.float32]:
    """On [0, 1]."""
    return picture.astype(np.float32) / np.float32(255)


def quality_lines(pictures: dict[str, list[Pixels]], unet: Any) -> Iterator[str]:
    yield f"Hardware: {hardware()}. Model `shapes`, {NUM_PROMPTS} prompts, 20 DDIM steps."
    yield ""
    yield "| option | PSNR dB, mean | worst | UNet seconds, one image | 8 images |"
    yield "| --- | --- | --- | --- | --- |"
    alone, together = measure_calls(unet, 1), measure_calls(unet, 8)
    for name, made in pictures.items():
        values = list(map(psnr, map(_floats, made), map(_floats, pictures["none"])))
        likeness = f"{mean(values):.1f} | {min(values):.1f}" if name != "none" else "same | same"
        shares = [f"{100 * times[name] / times['none']:.0f}%" for times in (alone, together)]
        yield f"| {name} | {likeness} | {shares[0]} | {shares[1]} |"


def operation_lines() -> Iterator[str]:
    yield "| model | TFLOP a row | shallow step | merging 0.25 | 0.5 | 0.75 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, title, side in (
        ("sd15", "SD 1.5", 512),
        ("sd15", "SD 1.5", 1024),
        ("sdxl", "SDXL", 1024),
    ):
        whole, *less = count_operations(name, side // 8)
        shares = " | ".join(f"{100 * count / whole:.0f}%" for count in less)
        yield f"| {title}, {side}x{side} | {whole / 1e12:.2f} | {shares} |"


def count_operations(name: str, side: int) -> list[int]:
    """FLOP of one row of `side` x `side` latents: a whole step, a shallow one, and whole ones with
    merged tokens."""
    config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet"]).eval()
        arguments: dict[str, Any] = {
            "sample": torch.empty(1, 4, side, side),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 77, config["text_width"]),
        }
        if config["pooled_width"]:
            arguments["added_cond_kwargs"] = {
                "text_embeds": torch.empty(1, config["pooled_width"]),
                "time_ids": torch.empty(1, 6),
            }
    with torch.no_grad():
        with kept_features(unet) as kept:
            counts = [count_call(unet, arguments)]
        counts.append(count_call(shallow(unet, kept[0]), arguments))
        for ratio in (0.25, 0.5, 0.75):
            with merged_tokens(unet, ratio, side, side):
                counts.append(count_call(unet, arguments))
    return counts


def count_call(unet: Any, arguments: dict[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        unet(**arguments)
    return int(counter.get_total_flops())


def draw_sheet(pictures: dict[str, list[Pixels]]) -> Image.Image:
    """One line of pictures an option."""
    margin = 130
    sheet = Image.new("RGB", (margin + SHOWN * SIDE, len(pictures) * SIDE), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (name, made) in enumerate(pictures.items()):
        pen.text((6, line * SIDE + 40), textwrap.fill(name, 20), fill="black")
        for column, picture in enumerate(made[:SHOWN]):
            sheet.paste(Image.fromarray(picture), (margin + column * SIDE, line * SIDE))
    return sheet


def main() -> None:
    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet", torch_dtype=torch.float32)
    pictures = draw_all()
    draw_sheet(pictures).save(PICTURES, optimize=True)
    tables = "\n".join([*quality_lines(pictures, unet), "", *operation_lines()])
    print(tables)
    report = REPORT.read_text(encoding="utf-8")
    REPORT.write_text(replaced(report, "less", tables), encoding="utf-8")


if __name__ == "__main__":
    main()
