"""Latents to images: precision, order of memory, images a call, and the way to the host."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from bench.gpu.bench import DTYPES, Bench
from bench.gpu.rows import Label
from bench.gpu.subjects import Subject, build
from bench.gpu.timing import median_seconds, peak_gb, reset_peak
from sdbento.runner.vae import decode


def measure(bench: Bench, model: str) -> None:
    subject = build(model, bench)
    subject.pipeline.unet.to("meta")  # to free its memory
    for precision in ("bf16", "fp16", "fp32") if bench.on_gpu else ("fp32",):
        vae = copy.deepcopy(subject.pipeline.vae).to(DTYPES[precision])
        for order in (torch.contiguous_format, torch.channels_last):
            vae.to(memory_format=order)
            # fp32 is only the reference for the others
            for images in bench.images[: 1 if precision == "fp32" and bench.on_gpu else None]:
                one_decode(bench, subject, vae, precision, images, order is torch.channels_last)
    for images in bench.images:
        with bench.part(3, what="to the host", model=model, images=images):
            to_the_host(bench, subject, images)


def one_decode(
    bench: Bench, subject: Subject, vae: Any, precision: str, images: int, last: bool
) -> None:
    order = "NHWC" if last else "NCHW"
    labels: dict[str, Label] = {
        "what": "decode",
        "model": subject.name,
        "precision": precision,
        "order": order,
        "images": images,
    }
    with bench.part(3, **labels):
        latents = random_latents(subject, images).to(vae.dtype)
        if last:
            latents = latents.to(memory_format=torch.channels_last)
        reset_peak(bench.device)
        repeats = max(2, bench.repeats // 2)
        seconds = median_seconds(lambda: vae.decode(latents), bench.device, repeats, warmups=2)
        bench.row(
            {"ms_per_image": 1000 * seconds / images, "peak_gb": peak_gb(bench.device)}, **labels
        )


def random_latents(subject: Subject, images: int) -> torch.Tensor:
    side = subject.side // 8
    return torch.randn(images, 4, side, side, device=subject.pipeline.device)


def to_the_host(bench: Bench, subject: Subject, images: int) -> None:
    """Latents to bytes in the host's memory: as the engine does it, and with the rounding on the
    device and pinned memory."""
    latents = random_latents(subject, images)
    ways = {
        "floats, rounded on the host": lambda: host_rounds(latents, subject),
        "bytes, rounded on the device": lambda: device_rounds(latents, subject),
    }
    for way, call in ways.items():
        seconds = median_seconds(call, bench.device, max(2, bench.repeats // 2), warmups=2)
        figures = {"ms_per_image": 1000 * seconds / images}
        bench.row(figures, what="decode to bytes on the host", way=way, images=images)


def host_rounds(latents: torch.Tensor, subject: Subject) -> Any:
    pixels = decode(latents, subject.pipeline).cpu().numpy()
    np.isfinite(pixels).all()
    return (pixels * 255).round().astype("uint8")


def device_rounds(latents: torch.Tensor, subject: Subject) -> Any:
    vae = subject.pipeline.vae
    scaled = (latents / float(vae.config.scaling_factor)).to(vae.dtype)
    decoded = vae.decode(scaled, return_dict=False)[0].float()
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=latents.is_cuda)
    host.copy_(pixels, non_blocking=True)
    if latents.is_cuda:
        torch.cuda.current_stream().synchronize()
    return host.numpy()
