"""Loads a model of Stable Diffusion 1.5's size from a slow network volume, in three ways in turn.

    python -m bench.volume [--runs 3]

    mapped        pages are read when they are touched, as safetensors does by itself
    one reader    the files are read ahead, one after another
    readers       the files are read ahead as the server does it, many parts at a time

Prints the seconds until every weight is in memory. `bench/slow_volume.py` has the volume's rates,
and what must be installed for it. The weights have no values: only their number counts here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from bench import slow_volume
from sdbento.models.memory import read_ahead
from sdbento.models.pipeline import modules
from tests.support.loading import load, resolve, settings
from tests.support.tiny import tiny_pipeline

CONFIG = Path(__file__).parent / "configs" / "sd15.json"
TEXT_ENCODER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
WAYS = {"mapped": 0, "one reader": 1, "readers": read_ahead.NUM_THREADS}  # threads


def save_model(folder: Path) -> None:
    """A folder as diffusers has it, of Stable Diffusion 1.5's size in fp32 (4.3 GB)."""
    config = json.loads(CONFIG.read_text())
    tokenizer = tiny_pipeline("sd15").tokenizer
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet"])
        vae = AutoencoderKL(**config["vae"])
        text_encoder = CLIPTextModel(
            CLIPTextConfig(num_attention_heads=12, vocab_size=len(tokenizer), **TEXT_ENCODER)
        )
    StableDiffusionPipeline(
        unet=unet.to_empty(device="cpu"),
        vae=vae.to_empty(device="cpu"),
        text_encoder=text_encoder.to_empty(device="cpu"),
        tokenizer=tokenizer,
        scheduler=tiny_pipeline("sd15").scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """The folder as a slow volume, of which nothing has been read yet."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "bench.slow_volume", str(folder), name]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while not Path(name).is_mount():
                if process.poll() is not None:
                    sys.exit("the volume cannot be mounted: see bench/slow_volume.py")
                time.sleep(0.05)
            yield Path(name)
        finally:
            subprocess.run(["fusermount3", "-u", name], check=True)
            process.wait()


def load_in_way(way: str, folder: Path) -> float:
    """Seconds until the model is loaded and each of its pages was read."""
    read_ahead.NUM_THREADS = WAYS[way]
    spec, given = resolve(folder), settings()
    started = time.perf_counter()
    pipeline = load(spec, given)
    for module in modules(pipeline.pipe):
        for parameter in module.parameters():
            parameter.view(-1).view(torch.uint8)[::4096].max()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a model from a slow network volume")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--way", choices=[*WAYS], help="load --folder in this way, once")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.way is not None:
        print(load_in_way(args.way, args.folder))
        return
    rates = slow_volume.LATENCY * 1e3, slow_volume.STREAM_RATE / 1e6, slow_volume.TOTAL_RATE / 1e6
    print("volume: {:.0f} ms a read, {:.0f} MB/s a reader, {:.0f} MB/s in all".format(*rates))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        for _ in range(args.runs):
            for way in WAYS:
                with mounted(Path(folder)) as volume:
                    command = [sys.executable, "-m", "bench.volume"]
                    command += ["--way", way, "--folder", str(volume)]
                    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                seconds[way].append(float(output))
                print(f"{way:<12} {seconds[way][-1]:6.1f} s", flush=True)
    for way in WAYS:
        print(f"{way:<12} median of {args.runs}: {sorted(seconds[way])[args.runs // 2]:.1f} s")


if __name__ == "__main__":
    main()
