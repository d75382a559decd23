"""Installs what requirements-dev.lock pins into this environment: `make install`.

Nothing is installed whose hash is not in a lock, or that is not in one: pip resolves nothing here.
PyPI's builds of torch for Linux want CUDA's libraries as well; those that requirements-cuda.lock
pins are installed only then. Runs in an environment that has nothing but pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = re.compile(r"^torch==([\w.]+)((?: \\\n +--hash=\S+)+)$", re.MULTILINE)
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]


def install(lock: str) -> None:
    subprocess.run([*PIP, "--requirement", lock], cwd=ROOT, check=True)


def cpu_torch(lock: str) -> str:
    """The pin of torch in the text of a lock, for its CPU build only."""
    [(version, hashes)] = TORCH.findall(lock)
    return f"torch=={version}+cpu{hashes}\n"


def install_cpu_torch() -> None:
    """Install the CPU build of torch, if pip finds one whose hash is in the lock.

    pip prefers files whose hash an index tells. So of a CPU build in a folder (`find-links`) and
    PyPI's build for CUDA, it would take the latter, and 3 GB of libraries with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "torch.txt"
        path.write_text(cpu_torch((ROOT / "requirements.lock").read_text(encoding="utf-8")))
        subprocess.run([*PIP, "--requirement", str(path)], capture_output=True)


def needs_cuda() -> bool:
    from packaging.requirements import Requirement  # a moment ago it was not installed

    needed = map(Requirement, metadata.requires("torch") or ())
    return any(
        one.name.startswith(("nvidia-", "cuda-", "triton"))
        and (not one.marker or one.marker.evaluate({"extra": ""}))
        for one in needed
    )


if __name__ == "__main__":
    install_cpu_torch()
    install("requirements-dev.lock")
    if needs_cuda():
        install("requirements-cuda.lock")
