"""Writes a software bill of materials (SBOM, CycloneDX): `make sbom`.

    python -m tools.sbom LOCK FILE

It has the name, version and package URL of every pin of the lock and of those that the lock
includes. `scripts/image` puts it into the image, beside the locks, which have the hashes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from sdbento import __version__

ROOT = Path(__file__).parent.parent
INCLUDED = re.compile(r"^-r (\S+)$", re.MULTILINE)
PINS = re.compile(r"^[\w.-]+==[^\s\\]+", re.MULTILINE)


def pins(lock: Path) -> list[str]:
    """`name==version` of everything that is installed with `lock`."""
    text = lock.read_text(encoding="utf-8")
    included = [pins(lock.with_name(name)) for name in INCLUDED.findall(text)]
    return sorted(sum(included, PINS.findall(text)), key=str.lower)


def write(lock: Path, path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", "requirements", "-"]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible"]
    command += ["--no-validate"]  # it takes seconds, and a test does
    given = "\n".join(pins(lock)).encode()
    answer = subprocess.run(command, input=given, check=True, stdout=subprocess.PIPE).stdout
    bom = json.loads(answer)
    bom["metadata"]["component"]["version"] = __version__
    path.write_text(json.dumps(bom, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
