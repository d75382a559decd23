"""Copies the trained pipeline into the package: float16 weights, without the paths they had."""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from training.saving import ORIGIN, forget
from training.tokenizer import save_tokenizer

HERE = Path(__file__).parent
PACKAGED = HERE.parents[1] / "sdbento" / "bundled" / "shapes"


def replace_folder(new: Path, target: Path) -> None:
    """Two renames, so that readers see the old model or the new one, whole."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def export(source: Path, target: Path) -> None:
    """Writes `source` to `target` in float16; whatever lies there is replaced at the end."""
    beside = target.with_name(f"{target.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(source, dtype=torch.float16)
    pipeline.save_pretrained(beside, safe_serialization=True)
    save_tokenizer(pipeline.tokenizer, beside / "tokenizer")
    forget(beside, ORIGIN)
    replace_folder(beside, target)


def main() -> None:
    """Exports the latest pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=HERE / "out" / "pipeline")
    parser.add_argument("--target", type=Path, default=PACKAGED)
    options = parser.parse_args()
    export(options.source, options.target)
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
