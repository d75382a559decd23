"""Whether the licences of all packages that run allow it: part of `make check`.

Judges what requirements.lock pins, by what the installed packages say of themselves: their licence
expression, else their classifiers, else the text that they call their licence. Knows nothing of
the tools in requirements-dev.lock, which are not handed on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent / "requirements.lock"
ALLOWED = re.compile(
    r"""(?:OSI\ Approved|BSL-1\.0|0BSD|ISC|Zlib|MIT(?:-0|-CMU)?|Unlicense|PSF-2\.0|CNRI-Python
    |CC0-1\.0|Apache-2\.0(?:\ WITH\ LLVM-exception)?|BSD-[23]-Clause(?:-Clear)?
    |Apache(?:\ Software)?\ License(?:\ 2\.0)?|Apache\ 2\.0\ License|MIT\ License
    |(?:3-Clause\ )?BSD\ License|ISC\ License\ \(ISCL\)|Python\ Software\ Foundation\ License
    |The\ Unlicense\ \(Unlicense\))""",
    re.VERBOSE,
)
# Copyleft for changes of the package itself; it is installed as its authors publish it.
UNCHANGED = "used as a library that anybody can replace, and not changed"
EXCEPTIONS = {
    "certifi": UNCHANGED,  # MPL 2.0
    "paramiko": UNCHANGED,  # LGPL 2.1; wanted by RunPod's SDK
    "pathspec": UNCHANGED,  # MPL 2.0; wanted by BentoML
    "psycopg": UNCHANGED,  # LGPL 3
    "psycopg-binary": UNCHANGED,  # LGPL 3
    "tqdm": UNCHANGED,  # MPL 2.0
}


def pinned(lock: str) -> list[str]:
    return re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)


def licence_of(package: metadata.PackageMetadata) -> str:
    """What a package says; empty if it says nothing."""
    said: dict[str, Any] = package.json
    if expression := said.get("license_expression"):
        return str(expression)
    classifiers = said.get("classifier", [])
    stated = [text.split(" :: ")[-1] for text in classifiers if text.startswith("License ::")]
    named = [text for text in stated if text != "OSI Approved"]
    return " AND ".join(named) or str(said.get("license", "")).partition("\n")[0].strip()


def is_allowed(licence: str) -> bool:
    """Whether all parts are; of alternatives one is enough."""
    alternatives = re.split(r"\s+OR\s+", licence.replace("(MIT)", "").strip())
    return any(
        all(ALLOWED.fullmatch(part.strip()) for part in re.split(r"\s+AND\s+", alternative))
        for alternative in alternatives
    )


def problems(names: list[str]) -> Iterator[str]:
    for name in names:
        licence = licence_of(metadata.metadata(name))
        if not is_allowed(licence) and name not in EXCEPTIONS:
            yield f"{name}: {licence or 'it states no licence'}"
    yield from (
        f"{name} is an exception, but not in the lock" for name in EXCEPTIONS.keys() - names
    )


def main() -> int:
    found = list(problems(pinned(LOCK.read_text(encoding="utf-8"))))
    for problem in found:
        print(f"licences: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
