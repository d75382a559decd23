"""Makes training go on from the packaged model: `python -m training.emoji.start`.

Fills a new `out` with its networks. Their optimizers begin anew.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file

from sdbento.catalog.specs import PACKAGE
from training.emoji.budget import save
from training.emoji.carry import KEPT, SHRUNK
from training.emoji.icons import OUT


def start(out: Path) -> None:
    """Writes out/pipeline, and each network where the stage that trains it looks for a start."""
    pipeline = PACKAGE / "bundled" / "emoji"
    shutil.copytree(pipeline, out / "pipeline")
    for name in KEPT:
        shutil.copytree(pipeline / name, out / name)
    for name in SHRUNK:
        (file,) = (pipeline / name).glob("*.safetensors")
        weights = {key: value.float() for key, value in load_file(file).items()}
        save(out / f"{name}.start.pt", weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    start(parser.parse_args().out)


if __name__ == "__main__":
    main()
