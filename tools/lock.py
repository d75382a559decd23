"""Writes requirements.lock (to run) and requirements-dev.lock (to work on it): `make lock`.

pip resolves pyproject.toml without installing anything, and every package that it names is pinned.
Existing pins are kept unless `--upgrade` is given. The lock leaves out local versions ("+cpu" of
torch), so that both CPU and CUDA builds satisfy it, and the packages that only CUDA builds of torch
need, because torch pins those itself.

Every pin has the hashes of all of its files on the index, which uv asks for: pip and uv install
nothing else. A build that only this machine's pip finds, such as the CPU build of torch, adds its
own hash, and hashes of pins that stay are kept: nobody has all builds at hand.

requirements-cuda.lock and requirements-gpu.lock are written by hand, but for their hashes.
requirements-docs.lock is for an environment of its own, which only builds the documentation.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUN, DEV = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"
CUDA, GPU = ROOT / "requirements-cuda.lock", ROOT / "requirements-gpu.lock"
DOCS = ROOT / "requirements-docs.lock"
WITH_CUDA = re.compile(r"nvidia-(?!ml-py)|cuda-|triton")
HEADER = "# Made by `make lock` from pyproject.toml.{}\n"
PIN = re.compile(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=\S+)*)$", re.MULTILINE)

Versions = dict[str, str]  # by name
Hashes = dict[tuple[str, str], set[str]]  # "sha256:..." by name and version


def resolve(targets: list[str], constraints: list[Path]) -> tuple[Versions, Hashes]:
    """Versions of everything that `targets` need on this interpreter, and the hashes of builds
    that are this machine's own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--no-build-isolation", "--ignore-installed", "--report", "-", *targets]
    for path in constraints:
        command += ["--constraint", str(path)]
    answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    versions, own = Versions(), Hashes()
    for item in json.loads(answer)["install"]:
        name, (version, local, _) = _name(item), item["metadata"]["version"].partition("+")
        if name == "sdbento" or WITH_CUDA.match(name):
            continue
        versions[name] = version
        if local:
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            own[name, version] = {f"sha256:{digest}"}
    return versions, own


def _name(item: Any) -> str:
    name: str = item["metadata"]["name"]
    return name


def without_hashes(paths: list[Path], folder: Path) -> list[Path]:
    """Copies that pip takes for constraints: it would want hashes of all that it resolves."""
    copies = []
    for path in paths:
        copies.append(folder / path.name)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        copies[-1].write_text(
            "".join(f"{name}=={version}\n" for name, version, _ in PIN.findall(text))
        )
    return copies


def known_hashes(path: Path) -> Hashes:
    """Those of the pins in a lock."""
    pins = PIN.findall(path.read_text(encoding="utf-8")) if path.exists() else []
    return {
        (name, version): set(re.findall(r"--hash=(\S+)", hashes)) for name, version, hashes in pins
    }


def hashes_of(versions: Versions) -> Hashes:
    """Of all files that the index has of these versions."""
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--no-deps"]
    command += ["--no-header", "--no-annotate", "--generate-hashes", "-"]
    pins = "".join(f"{name}=={version}\n" for name, version in versions.items())
    answer = subprocess.run(command, input=pins.encode(), check=True, stdout=subprocess.PIPE).stdout
    spelled = {_normal(name): name for name in versions}
    return {
        (spelled[_normal(name)], version): set(re.findall(r"--hash=(\S+)", hashes))
        for name, version, hashes in PIN.findall(answer.decode())
    }


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def write(path: Path, header: str, versions: Versions, own: Hashes) -> None:
    found, known = hashes_of(versions), known_hashes(path)
    lines = [header]
    for name in sorted(versions, key=str.lower):
        pin = name, versions[name]
        hashes = found[pin] | own.get(pin, set()) | known.get(pin, set())
        lines.append(" \\\n    --hash=".join([f"{name}=={pin[1]}", *sorted(hashes)]) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def lock_docs(constraints: list[Path]) -> None:
    """Pin what the documentation is built with: the group `docs` of pyproject.toml."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    versions, own = resolve(groups["dependency-groups"]["docs"], constraints)
    write(DOCS, HEADER.format("\n# An environment of its own: `make docs`."), versions, own)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        keep = [] if "--upgrade" in sys.argv else [DEV, RUN]
        run, own = resolve(["."], without_hashes(keep[-1:], Path(folder)))
        write(RUN, HEADER.format(""), run, own)
        dev, _ = resolve([".[dev]"], without_hashes([RUN, *keep[:-1]], Path(folder)))
        lock_docs(without_hashes([DOCS] if keep else [], Path(folder)))
    only_dev = {name: dev[name] for name in dev.keys() - run.keys()}
    write(DEV, HEADER.format("\n-r requirements.lock"), only_dev, {})
    for path in (CUDA, GPU):
        text = path.read_text(encoding="utf-8")
        first = next(PIN.finditer(text))
        header = text[: first.start()]
        write(path, header, {name: version for name, version, _ in PIN.findall(text)}, {})


if __name__ == "__main__":
    main()
