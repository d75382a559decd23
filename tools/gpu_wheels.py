"""Gathers wheels of the packages that a GPU machine without a network lacks: `make gpu-wheels`.

It is for machines that have torch, transformers and others (bench/gpu/machine.txt) but neither
diffusers nor pydantic. scripts/gpu-bench installs the wheels there. They are for Python 3.12 on
Linux, in the versions that requirements.lock pins. pip checks the downloads by the registry's
hashes; `changed` checks every file in a wheel by the wheel's own list.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".gpu-wheels"
LOCK = ROOT / "requirements.lock"
WANTED = (
    "annotated-types",
    "cachetools",
    "diffusers",
    "importlib_metadata",
    "opentelemetry-api",
    "pydantic",
    "pydantic-settings",
    "pydantic_core",
    "python-dotenv",
    "typing-inspection",
    "typing_extensions",
)
MAX_BYTES = 64 * 2**20  # of all wheels together
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17")


def pins() -> dict[str, str]:
    """Versions by name, from the lock."""
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.M))
    return {name: locked[name] for name in WANTED}


def download(folder: Path, wanted: dict[str, str]) -> None:
    """Fetches wheels for the bare machine by name and version."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in (*PLATFORMS, "manylinux2014", "manylinux1"):
        command += ["--platform", f"{platform}_x86_64"]
    command += ["--dest", str(folder), *(f"{name}=={version}" for name, version in wanted.items())]
    subprocess.run(command, check=True)


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with the wheels in `folder`."""
    wheels = sorted(folder.glob("*.whl"))
    found = sorted(identity(wheel) for wheel in wheels)
    expected = sorted((_normal(name), version) for name, version in pins().items())
    if found != expected:
        yield f"{folder} has {found}, not {expected}"
    if (total := sum(wheel.stat().st_size for wheel in wheels)) > MAX_BYTES:
        yield f"{folder} has {total} bytes, more than {MAX_BYTES}"
    for wheel in wheels:
        yield from (f"{wheel.name}: {file} is not what it should be" for file in changed(wheel))


def identity(wheel: Path) -> tuple[str, str]:
    name, version = wheel.name.split("-")[:2]
    return _normal(name), version


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def changed(wheel: Path) -> list[str]:
    """Files whose hash differs from the one in the wheel's RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        rows = csv.reader(io.StringIO(archive.read(record).decode("utf-8")))
        hashes = {file: digest for file, digest, _ in rows if digest}
        return [file for file, digest in hashes.items() if _digest(archive.read(file)) != digest]


def _digest(content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode("ascii")
    return f"sha256={digest.rstrip('=')}"


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    wanted = {(_normal(name), version) for name, version in pins().items()}
    for wheel in FOLDER.glob("*.whl"):
        if identity(wheel) not in wanted:
            wheel.unlink()
    download(FOLDER, pins())
    if wrong := list(problems(FOLDER)):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    wheels = sorted(FOLDER.glob("*.whl"))
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{FOLDER.name}: {len(wheels)} wheels, {total / 2**20:.1f} MiB, all hashes right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
