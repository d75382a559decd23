"""Carries `emoji` to a machine without a network, and back: `python -m training.emoji.carry`.

Alone, the command gathers in .emoji-gpu what such a machine lacks: the icons, two wheels, and, if
out/pipeline is there, a start for the next run in 8 bits. `--join FOLDER` makes out/pipeline of
what a run has brought back. Such a machine takes 64 MiB, and gives back files of 16 MiB.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.emoji.budget import save
from training.emoji.icons import OUT

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".emoji-gpu"
WHEELS = ("diffusers", "importlib_metadata")
PART_BYTES = 2**24 - 2**16
MAX_BYTES = 64 * 2**20
KEPT = ("vae", "tokenizer")
SHRUNK = ("unet", "text_encoder")


def split(pipeline: Path, target: Path) -> None:
    """Writes a pipeline as files of at most PART_BYTES: model.0, model.1, ..."""
    target.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(pipeline, "pipeline")
    data = content.getvalue()
    for number, start in enumerate(range(0, len(data), PART_BYTES)):
        (target / f"model.{number}").write_bytes(data[start : start + PART_BYTES])


def join(parts: Path, out: Path) -> None:
    """Makes out/pipeline of the files that `split` wrote."""
    files = sorted(parts.glob("model.*"), key=lambda path: int(path.suffix[1:]))
    data = b"".join(path.read_bytes() for path in files)
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "pipeline", ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(out, filter="data")


def shrink(pipeline: Path, target: Path) -> None:
    """Writes what a later run starts from.

    The autoencoder keeps float16: if its latents changed, the UNet would have to learn again.
    """
    for name in KEPT:
        shutil.copytree(pipeline / name, target / name, dirs_exist_ok=True)
    for name in SHRUNK:
        (file,) = (pipeline / name).glob("*.safetensors")
        weights = {key: quantise(value.float()) for key, value in load_file(file).items()}
        save(target / f"{name}.start8.pt", weights)


def take_up(out: Path, carried: Path) -> None:
    """Puts what was carried where the stages look for it, unless a run has made its own."""
    if not (out / "icons.zip").exists():
        shutil.copy(carried / "icons.zip", out / "icons.zip")
    start = carried / "start"
    if not start.exists() or (out / "vae").exists():
        return
    for name in KEPT:
        shutil.copytree(start / name, out / name)
    for name in SHRUNK:
        weights = torch.load(start / f"{name}.start8.pt")
        save(out / f"{name}.start.pt", {key: value * s for key, (value, s) in weights.items()})


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits and a factor for each row of it; vectors stay as they are."""
    if weight.ndim < 2:
        return weight, torch.ones(())
    factors = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    factors = factors.view(-1, *[1] * (weight.ndim - 1))
    return (weight / factors).round().to(torch.int8), factors


def gather(out: Path, folder: Path) -> None:
    """Fills `folder`, and says whether it fits beside the repository."""
    # Not at the top: on the bare machine another package could be called `tools`.
    from tools import gpu_wheels

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(out / "icons.zip", folder / "icons.zip")
    gpu_wheels.download(folder, {name: gpu_wheels.pins()[name] for name in WHEELS})
    if (out / "pipeline").exists():
        shrink(out / "pipeline", folder / "start")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    tracked = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    carried = [path for path in folder.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in [*tracked, *carried] if path.exists())
    print(f"{folder.name} and the repository: {total / 2**20:.1f} of {MAX_BYTES / 2**20:.0f} MiB")
    if total > MAX_BYTES:
        raise SystemExit("that is too much")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--join", type=Path, help="folder with the files of an earlier run")
    options = parser.parse_args()
    if options.join:
        join(options.join, options.out)
    else:
        gather(options.out, FOLDER)


if __name__ == "__main__":
    main()
