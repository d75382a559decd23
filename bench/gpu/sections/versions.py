"""The machine's hardware and versions; then small networks of both families, in every precision."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from bench.gpu.bench import DTYPES, Bench
from bench.gpu.rows import Kind, Label
from bench.gpu.subjects import EngineRun, build, stock_images

PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "numpy")
ROOT = Path(__file__).parents[3]


def measure(bench: Bench) -> None:
    bench.log.add(bench.section, Kind.HEADER, figures=machine(bench))
    for model in ("sdxl", "sd15"):
        for precision in ("fp16", "bf16", "fp32") if bench.on_gpu else ("fp32",):
            with bench.part(3, model=model, precision=precision):
                small(bench, model, precision)


def machine(bench: Bench) -> dict[str, Label]:
    found: dict[str, Label] = {
        "device": torch.cuda.get_device_name() if bench.on_gpu else f"CPU ({platform.machine()})",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "revision": revision(),
        "python": platform.python_version(),
        "cpus": os.cpu_count() or 0,
    }
    found |= {name: _version(name) for name in PACKAGES}
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {
            "cuda": str(torch.version.cuda),
            "cudnn": torch.backends.cudnn.version() or 0,
            "driver": _driver(),
            "memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return found


def revision() -> str:
    """The revision of the code, if it came with its repository."""
    answer = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return answer or "unknown"


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def _output(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # the command is missing or fails
        return ""
    return answer.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def small(bench: Bench, model: str, precision: str) -> None:
    """Small networks of the family: the engine's latents beside the stock pipeline's."""
    toy = Bench(bench.log, bench.section, bench.options.as_toy(), bench.left())
    subject = build(model, toy, DTYPES[precision])
    ours = EngineRun(subject, range(2), subject.steps).latents()
    theirs = stock_images(subject, range(2), subject.steps).float()
    bench.row(
        {
            "largest": float((ours - theirs).abs().max()),
            "deviation": float(theirs.std()),
            "finite": str(bool(ours.isfinite().all())),
        },
        what="small networks, latents of engine and stock",
        model=model,
        precision=precision,
    )
