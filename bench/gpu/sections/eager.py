"""A denoising step without a compiler: stock and engine at 1 to 8 images, and its time by part."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.bench import Bench
from bench.gpu.rows import Label
from bench.gpu.subjects import EngineRun, Subject, build, stock_images
from bench.gpu.timing import Marks, peak_gb, reset_peak, true_fp32, wall_seconds
from bench.noise import RoundedNoise
from sdbento.models.acceleration.attention import fit
from sdbento.prompts.encoder import Conditioning
from sdbento.runner.graphs import Graphs
from sdbento.settings import Settings

TIMED_STEPS, WARM_STEPS = 10, 2
TOP_KERNELS = 12
PROFILED_STEPS = 2
# The host's calls to CUDA in a step; each wait delays the launches behind it.
CALLS = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "copies": ("cudaMemcpy",),
    "stream_waits": ("cudaStreamSynchronize", "cudaEventSynchronize"),
    "device_waits": ("cudaDeviceSynchronize",),
}
CLASSES = (
    ("attention", ("flash", "fmha", "attention", "sdpa", "softmax")),
    ("convolution", ("conv", "fprop", "implicit", "winograd", "xmma")),
    ("matmul", ("gemm", "cutlass", "cublas", "nvjet", "addmm", "::mm", "bmm", "linear")),
    ("norm", ("norm", "rowwisemoments", "welford")),
    ("copy or layout", ("copy", "memcpy", "nchw", "nhwc", "transpose", "cat")),
    ("elementwise", ("elementwise", "silu", "gelu", "mul", "add", "vectorized")),
)


def measure(bench: Bench, model: str) -> None:
    subject = build(model, bench)
    steps(bench, subject)
    for images in sorted({1, max(bench.images)}):
        with bench.part(8, what="profile", model=model, images=images):
            profiled(bench, subject, images)
    with bench.part(8, what="latents against stock fp32", model=model):
        against_fp32(bench, subject)
    with bench.part(5, what="attention", model=model):
        measured_attention(bench, subject)


def steps(bench: Bench, subject: Subject) -> None:
    """Milliseconds of a step of stock and engine."""
    measures = {"stock": stock_step_seconds, "engine": engine_step_seconds}
    for images in bench.images:
        for system, seconds_of in measures.items():
            labels: dict[str, Label] = {"what": "a step", "model": subject.name}
            labels |= {"precision": bench.precision, "images": images, "system": system}
            with bench.part(3, **labels):
                reset_peak(bench.device)
                seconds = seconds_of(bench, subject, images)
                figures = step_figures(subject, images, seconds)
                bench.row(figures | {"peak_gb": peak_gb(bench.device)}, **labels)


def measured_attention(bench: Bench, subject: Subject) -> None:
    """Which attention the server would choose for this UNet, and a step with it."""
    pixels = subject.key.latent_pixels
    attention = fit(subject.pipeline.unet, Settings(enable_xformers=True), pixels)
    chosen = replace(subject, pipeline=replace(subject.pipeline, attention=attention))
    images = max(bench.images)
    figures = step_figures(subject, images, engine_step_seconds(bench, chosen, images))
    bench.row(
        figures | {"attention": attention.name},
        what="a step with the attention that was measured",
        model=subject.name,
        images=images,
    )


def step_figures(subject: Subject, images: int, seconds: float) -> dict[str, Label]:
    """Images a second are those of steps alone, without text and VAE."""
    return {
        "ms_per_step": 1000 * seconds,
        "images_per_s": images / seconds / subject.steps,
        "tflops": 2 * images * subject.tflop_per_row / seconds,
    }


def stock_step_seconds(bench: Bench, subject: Subject, images: int) -> float:
    """From the end of one step to the end of the next, on the device's clock."""
    for _ in range(2):
        stock_images(subject, range(images), WARM_STEPS)
    marks = Marks(bench.device)
    stock_images(subject, range(images), bench.repeats + 2, marks=marks)
    return median(marks.intervals()[1:])


def engine_step_seconds(
    bench: Bench, subject: Subject, images: int, graphs: Graphs | None = None
) -> float:
    """A call of the runner and the wait for its result, so the host's clock is right."""
    run = EngineRun(subject, range(images), bench.repeats + WARM_STEPS, graphs)
    for _ in range(WARM_STEPS):
        run.step()
    return median(wall_seconds(run.step, bench.device) for _ in range(bench.repeats))


def profiled(
    bench: Bench, subject: Subject, images: int, graphs: Graphs | None = None, variant: str = ""
) -> None:
    """Where the time of an engine's step goes. The device's idle time follows from the step's time
    without the profiler, which slows the host down."""
    seconds = engine_step_seconds(bench, subject, images, graphs)
    run = EngineRun(subject, range(images), WARM_STEPS + PROFILED_STEPS, graphs)
    run.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            run.step()
    events = profiler.key_averages()
    labels: dict[str, Label] = {"model": subject.name, "images": images}
    if variant:
        labels["variant"] = variant
    kernels = [(e.key, _kernel_ms(e, bench.on_gpu), e.count / PROFILED_STEPS) for e in events]
    kernels = sorted([k for k in kernels if k[1] > 0], key=lambda kernel: -kernel[1])
    busy = sum(ms for _, ms, _ in kernels)
    if not bench.needs_cuda(what="idle share", **labels):
        counts = {
            name: sum(e.count for e in events if e.key.startswith(starts)) / PROFILED_STEPS
            for name, starts in CALLS.items()
        }
        bench.row(
            {"ms_per_step": 1000 * seconds, "busy_ms": busy}
            | {"idle_share": max(0.0, 1 - busy / (1000 * seconds))}
            | counts,
            what="step",
            **labels,
        )
    shares: dict[str, float] = {}
    for name, ms, _ in kernels:
        shares[_class(name)] = shares.get(_class(name), 0.0) + ms
    for kind, ms in sorted(shares.items(), key=lambda item: -item[1]):
        bench.row({"ms": ms, "share": ms / busy}, what="kernels", kind=kind, **labels)
    for name, ms, calls in kernels[: 3 if bench.toy else TOP_KERNELS]:
        bench.row(
            {"ms": ms, "calls": calls, "share": ms / busy},
            what="the dearest kernels",
            kernel=name[:90],
            **labels,
        )


def _kernel_ms(event: Any, on_gpu: bool) -> float:
    """A step's milliseconds of what ran on the device itself (operators would count twice); on a
    CPU of the operators."""
    if not on_gpu:
        return float(event.self_cpu_time_total) / 1000 / PROFILED_STEPS
    if event.device_type.name != "CUDA":
        return 0.0
    return float(event.self_device_time_total) / 1000 / PROFILED_STEPS


def _class(name: str) -> str:
    lowered = name.lower()
    return next((k for k, marks in CLASSES if any(m in lowered for m in marks)), "other")


def against_fp32(bench: Bench, subject: Subject, other: str = "stock") -> None:
    """How far the latents of both are from the stock pipeline's with the same weights in fp32.

    `other`: what the subject's stock pipeline is, which shares the UNet's blocks.
    """
    steps, seeds = min(4, subject.steps), range(2)
    exact = build(subject.name, bench, torch.float32)
    exact.pipeline.unet.load_state_dict(
        {name: tensor.float() for name, tensor in subject.pipeline.unet.state_dict().items()}
    )
    exact = replace(exact, prompt=_in_fp32(subject.prompt), negative=_in_fp32(subject.negative))
    with RoundedNoise():
        ours = EngineRun(subject, seeds, steps).latents()
        theirs = stock_images(subject, seeds, steps).float()
        with true_fp32():
            reference = stock_images(exact, seeds, steps)
    distance = {
        name: float((latents - reference).norm() / reference.norm())
        for name, latents in (("engine", ours), (other, theirs))
    }
    bench.row(
        {f"{name}_distance": value for name, value in distance.items()},
        what=f"latents after {steps} steps, relative to stock fp32",
        model=subject.name,
        precision=bench.precision,
    )


def _in_fp32(text: Conditioning) -> Conditioning:
    pooled = None if text.pooled is None else text.pooled.float()
    return Conditioning(text.embeds.float(), pooled)
