"""Writes requirements.lock (to run) and requirements-dev.lock (to work on it): `make lock`.

pip resolves pyproject.toml without installing anything, and every package that it names is pinned.
Existing pins are kept unless `--upgrade` is given. The lock leaves out local versions ("+cpu" of
torch), so that both CPU and CUDA builds satisfy it, and the packages that only CUDA builds of torch
need, because torch pins those itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUN, DEV = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"
WITH_CUDA = re.compile(r"nvidia-(?!ml-py)|cuda-|triton")
HEADER = "# Made by `make lock` from pyproject.toml.{}\n"


def resolve(target: str, constraints: list[Path]) -> dict[str, str]:
    """Versions by name of everything that `target` needs, on this interpreter."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--no-build-isolation", "--ignore-installed", "--report", "-", target]
    for path in constraints:
        command += ["--constraint", str(path)]
    answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    packages = [item["metadata"] for item in json.loads(answer)["install"]]
    found = {package["name"]: package["version"].partition("+")[0] for package in packages}
    return {
        name: version
        for name, version in found.items()
        if name != "sdbento" and not WITH_CUDA.match(name)
    }


def write(path: Path, versions: dict[str, str], note: str = "") -> None:
    pins = [f"{name}=={versions[name]}\n" for name in sorted(versions, key=str.lower)]
    path.write_text(HEADER.format(note) + "".join(pins), encoding="utf-8")


def main() -> None:
    keep = [] if "--upgrade" in sys.argv else [path for path in (DEV, RUN) if path.exists()]
    run = resolve(".", keep[-1:])
    write(RUN, run)
    dev = resolve(".[dev]", [RUN, *keep[:-1]])
    write(DEV, {name: dev[name] for name in dev.keys() - run.keys()}, "\n-r requirements.lock")


if __name__ == "__main__":
    main()
