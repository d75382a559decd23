"""Installs what requirements-dev.lock pins into this environment: `make install`.

Nothing is installed whose hash is not in a lock, or that is not in one: pip resolves nothing here.
PyPI's builds of torch for Linux want CUDA's libraries as well; those that requirements-cuda.lock
pins are installed only then. Runs in an environment that has nothing but pip.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def install(lock: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--requirement", lock], cwd=ROOT, check=True)


def needs_cuda() -> bool:
    from packaging.requirements import Requirement  # a moment ago it was not installed

    needed = map(Requirement, metadata.requires("torch") or ())
    return any(
        one.name.startswith(("nvidia-", "cuda-", "triton"))
        and (not one.marker or one.marker.evaluate({"extra": ""}))
        for one in needed
    )


if __name__ == "__main__":
    install("requirements-dev.lock")
    if needs_cuda():
        install("requirements-cuda.lock")
