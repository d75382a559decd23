"""Full-size SDXL and SD 1.5 with random weights: stock diffusers against this engine, in one run.

    python -m bench.gpu            # on a GPU; needs no bentoml and downloads nothing
    python -m bench.gpu --toy      # the same with small networks, on a CPU too

Speed does not depend on the values of weights. Prints, for 1, 2, 4 and 8 guided images: step
time, images a second and the share of the matmul rate measured in the same run, for the stock
pipeline and for the engine's runner; then the difference of their images in the same precision,
and peak memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from sdbento.adapters import WeightedAdapter
from sdbento.catalog import ModelSpec
from sdbento.families import Family
from sdbento.pipelines import Pipeline
from sdbento.prompts import Conditioning, PreparedPrompt, PromptEncoder
from sdbento.runner import TorchRunner, decode_pixels
from sdbento.samplers import SamplerSpec, compile_table
from sdbento.trajectory import BatchKey, ImageInputs, SizeConditioning, Stage, StepPlan, Trajectory

CONFIGS = Path(__file__).parent / "configs"
BATCHES = (1, 2, 4, 8)
GUIDANCE = 7.5
TIMED_STEPS = 10
TOY_CHANNELS = [32, 64, 64, 64]
TOY_GROUPS = 8


@dataclass(frozen=True)
class Subject:
    """A model with random weights and the text embeddings that stand for its prompts."""

    name: str
    pipeline: Pipeline
    prompt: Conditioning
    negative: Conditioning
    side: int
    steps: int
    tflop_per_row: float


class FixedPrompts(PromptEncoder):
    """Stands in for the text encoders, which are no part of a step."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self._subject = subject

    def encode(
        self,
        pipeline: Pipeline,
        prompt: PreparedPrompt,
        num_chunks: int,
        adapters: Sequence[WeightedAdapter] = (),
    ) -> Conditioning:
        return self._subject.negative if prompt.is_absent else self._subject.prompt


def build(name: str, dtype: torch.dtype, device: torch.device, toy: bool) -> Subject:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    if toy:
        _shrink(config)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config["unet"]).to(dtype).eval()
        vae = AutoencoderKL(**config["vae"]).eval()
    is_sdxl = config["pooled_width"] is not None
    vae_dtype = torch.bfloat16 if is_sdxl and dtype is torch.float16 else dtype
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    pipe = _pipe(is_sdxl, unet, vae.to(vae_dtype), scheduler)
    spec = ModelSpec(
        name=name,
        family=Family.SDXL if is_sdxl else Family.SD15,
        sources=(),
        width=config["side"],
        height=config["side"],
        num_inference_steps=config["steps"],
        guidance_scale=GUIDANCE,
        sampler=None,
        memory_gb=1.0,
    )
    pipeline = Pipeline(spec, pipe, device, dtype, vae_dtype, 0)
    return Subject(
        name,
        pipeline,
        prompt=_text(config, dtype, device, seed=1),
        negative=_text(config, dtype, device, seed=2),
        side=config["side"],
        steps=config["steps"],
        tflop_per_row=config["tflop_per_row"],
    )


def _shrink(config: dict[str, Any]) -> None:
    levels = len(config["unet"]["block_out_channels"])
    config["unet"] |= {
        "block_out_channels": TOY_CHANNELS[:levels],
        "norm_num_groups": TOY_GROUPS,
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
    }
    config["vae"] |= {"block_out_channels": TOY_CHANNELS, "norm_num_groups": TOY_GROUPS}
    config["side"], config["steps"] = 64, 4


def _pipe(is_sdxl: bool, unet: Any, vae: Any, scheduler: Any) -> Any:
    empty = {"text_encoder": None, "tokenizer": None, "unet": unet, "vae": vae}
    if is_sdxl:
        pipe = StableDiffusionXLPipeline(
            **empty, text_encoder_2=None, tokenizer_2=None, scheduler=scheduler
        )
    else:
        pipe = StableDiffusionPipeline(
            **empty,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int
) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, 77, config["text_width"], generator=generator).to(device, dtype)
    pooled = None
    if config["pooled_width"]:
        pooled = torch.randn(1, config["pooled_width"], generator=generator).to(device, dtype)
    return Conditioning(embeds, pooled)


def stock_images(subject: Subject, batch: int, steps: int, output_type: str) -> Any:
    """`batch` guided images by one call of the stock pipeline."""
    extra = {}
    if subject.prompt.pooled is not None and subject.negative.pooled is not None:
        extra["pooled_prompt_embeds"] = subject.prompt.pooled.repeat(batch, 1)
        extra["negative_pooled_prompt_embeds"] = subject.negative.pooled.repeat(batch, 1)
    return subject.pipeline.pipe(
        prompt_embeds=subject.prompt.embeds.repeat(batch, 1, 1),
        negative_prompt_embeds=subject.negative.embeds.repeat(batch, 1, 1),
        **extra,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        height=subject.side,
        width=subject.side,
        generator=[torch.Generator().manual_seed(i) for i in range(batch)],
        output_type=output_type,
    ).images


def trajectories(subject: Subject, batch: int, steps: int) -> tuple[Trajectory, ...]:
    size = SizeConditioning((subject.side, subject.side), (0, 0), (subject.side, subject.side))
    config = subject.pipeline.scheduler_config
    table = compile_table(SamplerSpec("Euler"), config, steps)
    key = BatchKey(subject.name, subject.side // 8, subject.side // 8)
    prompt, absent = PreparedPrompt(()), PreparedPrompt((), is_absent=True)
    return tuple(
        Trajectory(
            key,
            table.num_steps,
            range(table.num_steps),
            ImageInputs(((0, prompt),), ((0, absent),), seed, GUIDANCE, 0.0, table, size, size),
            pipeline=subject.pipeline,
        )
        for seed in range(batch)
    )


class EngineRun:
    """The engine's runner on a batch that stays together."""

    def __init__(self, subject: Subject, batch: int, steps: int) -> None:
        self._runner = TorchRunner(FixedPrompts(subject))
        self.trajectories = trajectories(subject, batch, steps)
        self._execute(Stage.PREPARE)

    def step(self) -> None:
        self._execute(Stage.STEP)
        for trajectory in self.trajectories:
            trajectory.step += 1

    def _execute(self, stage: Stage) -> None:
        self._runner.execute(StepPlan(stage, self.trajectories[0].key, self.trajectories))


def engine_step_seconds(subject: Subject, batch: int) -> float:
    run = EngineRun(subject, batch, TIMED_STEPS + 2)
    run.step()
    run.step()
    return median(_seconds(run.step) for _ in range(TIMED_STEPS))


def stock_step_seconds(subject: Subject, batch: int) -> float:
    """Seconds a step: what ten steps more take, so that everything outside the loop cancels out."""
    stock_images(subject, batch, 2, "latent")
    short = _seconds(lambda: stock_images(subject, batch, 2, "latent"))
    long = _seconds(lambda: stock_images(subject, batch, 2 + TIMED_STEPS, "latent"))
    return (long - short) / TIMED_STEPS


def _seconds(call: Callable[[], Any]) -> float:
    _synchronize()
    started = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_tflops(device: torch.device) -> float:
    """The rate of a large bf16 matmul: what this device can do in practice."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * side**3 / median(_seconds(lambda: a @ b) for _ in range(10)) / 1e12


def image_difference(subject: Subject) -> tuple[float, float]:
    """Mean and largest difference on [0, 1] of engine and stock pipeline, two images."""
    run = EngineRun(subject, 2, subject.steps)
    for _ in range(subject.steps):
        run.step()
    ours = decode_pixels(run.trajectories)
    theirs = stock_images(subject, 2, subject.steps, "np")
    difference = np.abs(ours - theirs)
    return float(difference.mean()), float(difference.max())


@torch.inference_mode()
def report(subject: Subject, peak_rate: float) -> list[str]:
    lines = [
        f"{subject.name}, {subject.side}x{subject.side}, {subject.pipeline.dtype}, "
        f"guidance {GUIDANCE}, {subject.steps} Euler steps (images/s without text and VAE)",
        "",
        "| images | stock ms/step | engine ms/step | stock images/s | engine images/s "
        "| engine/stock | engine's share of the matmul rate | peak GB |",
        "| --- " * 8 + "|",
    ]
    for batch in BATCHES:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        stock, ours = stock_step_seconds(subject, batch), engine_step_seconds(subject, batch)
        rate = 2 * batch * subject.tflop_per_row / ours
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        lines.append(
            f"| {batch} | {1000 * stock:.1f} | {1000 * ours:.1f} "
            f"| {batch / stock / subject.steps:.2f} | {batch / ours / subject.steps:.2f} "
            f"| {stock / ours:.2f} | {rate / peak_rate:.0%} | {peak:.1f} |"
        )
    mean, largest = image_difference(subject)
    lines += [
        "",
        f"Images, engine to stock: mean difference {mean:.1e}, largest {largest:.1e}.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl"])
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16", "fp32"])
    parser.add_argument("--toy", action="store_true", help="small networks, on a CPU too")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.toy:
        parser.error("no GPU here; --toy runs small networks on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = precisions[options.precision] if device.type == "cuda" else torch.float32
    peak_rate = matmul_tflops(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}: bf16 matmul {peak_rate:.0f} TFLOP/s\n")
    for name in options.models:
        print("\n".join(report(build(name, dtype, device, options.toy), peak_rate)), end="\n\n")


if __name__ == "__main__":
    main()
