"""Less work for a picture: what DeepCache, token merging and a guidance interval save and cost.

python -m bench.less_work

Draws 16 prompts with `shapes`, first as usual and then with each option, and compares the pictures
(PSNR) and the seconds that the UNet took. The options take turns, so that a machine that slows down
slows all of them. For full-size models it counts operations, on tensors without data. Writes the
tables into docs/performance.md and the pictures into docs/images.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

from bench.http import hardware
from bench.profile import Recorder
from bench.trace import COLOURS, SHAPES
from sdbento.app import App
from sdbento.engine.trajectory import Stage
from sdbento.environment import load_settings
from sdbento.request.schema import GenerateRequest
from sdbento.runner.deep_cache import kept_features, shallow
from sdbento.runner.token_merging import merged_tokens

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "bench" / "configs"
REPORT = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "images" / "less-work.png"
ROUNDS = 5
NUM_PROMPTS = 16
SHOWN = 8  # of the prompts
FIELDS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0, "scheduler": "DDIM"}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "deep_cache_interval 2": {"deep_cache_interval": 2},
    "deep_cache_interval 3": {"deep_cache_interval": 3},
    "deep_cache_interval 5": {"deep_cache_interval": 5},
    "token_merging_ratio 0.25": {"token_merging_ratio": 0.25},
    "token_merging_ratio 0.5": {"token_merging_ratio": 0.5},
    "guidance 0.2 to 0.8": {"guidance_start": 0.2, "guidance_end": 0.8},
    "interval 3 and guidance 0.2 to 0.8": {
        "deep_cache_interval": 3,
        "guidance_start": 0.2,
        "guidance_end": 0.8,
    },
}
Pixels = NDArray[np.uint8]


@dataclass
class Measured:
    """Of one option: its pictures, and in every round the UNet's seconds."""

    pictures: list[Pixels] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)  # of one image
    together: list[float] = field(default_factory=list)  # of all images at once


def measure(rounds: int = ROUNDS) -> dict[str, Measured]:
    recorder = Recorder()
    app = App(load_settings(sd_model="shapes", max_batch_size=NUM_PROMPTS), recorder)
    app.start()
    try:
        while not app.ready:
            time.sleep(0.05)
        measured = {name: Measured() for name in OPTIONS}
        for i in range(1 + rounds):  # the first one warms up
            for name, option in OPTIONS.items():
                of_option, requests = measured[name], make_requests(option)
                alone, _ = run(app, recorder, requests[:1])
                together, of_option.pictures = run(app, recorder, requests)
                if i > 0:
                    of_option.alone.append(alone)
                    of_option.together.append(together)
        return measured
    finally:
        app.close()


def make_requests(option: dict[str, Any]) -> list[GenerateRequest]:
    """Every shape at least twice, every colour at least twice."""
    requests = []
    for i in range(NUM_PROMPTS):
        colour, background = COLOURS[i % 6], COLOURS[(i + 1 + i // 6) % 6]
        prompt = f"a large {colour} {SHAPES[(i + i // 6) % 6]} on a {background} background"
        requests.append(GenerateRequest(prompt=prompt, seed=i, **FIELDS, **option))
    return requests


def run(
    app: App, recorder: Recorder, requests: Sequence[GenerateRequest]
) -> tuple[float, list[Pixels]]:
    """Seconds of all steps, and the pictures."""

    async def run_all() -> list[Pixels]:
        results = await asyncio.gather(*(app.run(request) for request in requests))
        return [np.asarray(result.images[0]) for result in results]

    recorder.calls.clear()
    pictures = asyncio.run(run_all())
    return sum(c.seconds for c in recorder.calls if c.stage is Stage.STEP), pictures


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def quality_lines(measured: dict[str, Measured]) -> Iterator[str]:
    whole = measured["none"]
    yield f"Hardware: {hardware()}. Model `shapes`, {NUM_PROMPTS} prompts, 20 DDIM steps."
    yield ""
    yield "| option | PSNR dB, mean | worst | UNet seconds, one image | 16 at once |"
    yield "| --- | --- | --- | --- | --- |"
    for name, one in measured.items():
        values = [psnr(a, b) for a, b in zip(one.pictures, whole.pictures, strict=True)]
        shares = (
            median(a / b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in ((one.alone, whole.alone), (one.together, whole.together))
        )
        alone, together = (f"{100 * share:.0f}%" for share in shares)
        likeness = f"{mean(values):.1f} | {min(values):.1f}" if one is not whole else "same | same"
        yield f"| {name} | {likeness} | {alone} | {together} |"


def operation_lines() -> Iterator[str]:
    yield "| model | TFLOP a row | shallow step | merging 0.25 | 0.5 | 0.75 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, title in (("sd15", "SD 1.5, 512x512"), ("sdxl", "SDXL, 1024x1024")):
        whole, *less = count_operations(name)
        shares = " | ".join(f"{100 * count / whole:.0f}%" for count in less)
        yield f"| {title} | {whole / 1e12:.2f} | {shares} |"


def count_operations(name: str) -> list[int]:
    """FLOP of one row: a whole step, a shallow one, and whole ones with merged tokens."""
    config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    side = config["side"] // 8
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


def draw(measured: dict[str, Measured]) -> Image.Image:
    """One line of pictures an option."""
    side, margin = 128, 100
    sheet = Image.new("RGB", (margin + SHOWN * side, len(measured) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (name, one) in enumerate(measured.items()):
        pen.text((6, line * side + 40), name.replace(" ", "\n"), fill="black")
        for column, picture in enumerate(one.pictures[:SHOWN]):
            sheet.paste(Image.fromarray(picture), (margin + column * side, line * side))
    return sheet


def main() -> None:
    measured = measure()
    draw(measured).save(PICTURES, optimize=True)
    tables = "\n".join([*quality_lines(measured), "", *operation_lines()])
    print(tables)
    pattern = r"(<!-- less:begin[^\n]*-->\n).*?(<!-- less:end -->)"
    written = re.sub(
        pattern,
        lambda match: f"{match[1]}{tables}\n{match[2]}",
        REPORT.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    REPORT.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
